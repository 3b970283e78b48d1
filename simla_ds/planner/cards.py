"""What cards can do, by their makers' data sheets: dense half-precision products with float32 sums, one direction."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One device, as a rank has it."""

    memory: float
    """Bytes that a process can have."""
    flops: float
    """Operations per second at peak."""
    bandwidth: float
    """Bytes of its memory per second."""
    link: float
    """Bytes per second to the other cards of its node."""
    network: float
    """Bytes per second to other nodes, of each card: a port of 200 Gb/s (A100), 400 Gb/s (H100, H200), else 100 Gb/s
    shared by eight."""
    cpu: bool = False
    """Whether it computes as a CPU does, in float32 unless told otherwise."""


CARDS = {
    "A100-40": Card(39.5 * GIB, 312e12, 1.555e12, 300e9, 25e9),
    "A100-80": Card(79.2 * GIB, 312e12, 2.039e12, 300e9, 25e9),
    "H100": Card(79.1 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "H200": Card(139.8 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "L40S": Card(44.5 * GIB, 362e12, 0.864e12, 32e9, 1.6e9),
    "24GB": Card(23.5 * GIB, 165e12, 1.008e12, 32e9, 1.6e9),
    "CPU": Card(16 * GIB, 0.1e12, 0.02e12, 5e9, 1.25e9, cpu=True),
}
"""24GB: a GeForce RTX 4090. CPU: a rank on one core of a server, 16 GiB to it."""
