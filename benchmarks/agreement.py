"""Whether contenders compute the same: what is faster at something else has won nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAME_ARITHMETIC = 1e-4
"""Largest relative difference, in fp32, of two orders of one computation."""


def largest_difference(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference of any entry, in units of the largest entry of its wanted tensor; NaN if one is."""
    found = [_difference(a.detach().float(), b.detach().float()) for a, b in zip(made, wanted, strict=True)]
    return float(torch.stack(found).max()) if found else 0.0  # torch's max keeps a NaN, Python's may not


def objection(what: str, difference: float, limit: float) -> list[str]:
    """Return a line when the difference is above the limit or not a number, else nothing."""
    return [] if difference <= limit else [f"{what} differs by {difference:.2g}, more than {limit:.0e} (relative)"]


def _difference(made: Tensor, wanted: Tensor) -> Tensor:
    if not wanted.numel():
        return wanted.new_zeros(())
    return (made - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
