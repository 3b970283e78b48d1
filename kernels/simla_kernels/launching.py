"""How a Triton kernel is launched, and how what would be launched is written down for a card that is not here.

A launch goes through `launch`, so that ahead-of-time compilation (recording) sees the very arguments, specialisation
and configuration that a card would get.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Cards that every kernel is compiled for: A100, H100, B200, MI300X."""


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (constexpr arguments of the kernel), warps of a program, depth of the load pipeline."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int = 2


@dataclass
class Launch:
    """One recorded launch."""

    kernel: Any
    """The @triton.jit function."""
    arguments: dict[str, Any]
    """By parameter name: tensors (of any device), numbers, constexprs."""
    config: LaunchConfig


@dataclass
class Recording:
    """Launches meant for an architecture."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextmanager
def recording(architecture: str) -> Iterator[Recording]:
    """Within this context `launch` writes down what it would launch on `architecture` and runs nothing."""
    global _recording
    _recording = Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, **arguments: Any) -> None:
    """Launch `kernel` over `grid` programs, its arguments given by name."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, {**arguments, **config.tiles}, config))
    elif all(grid):  # an empty tensor has no programs, and a driver refuses an empty grid
        device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
        # Triton launches on the current card, which need not be the tensors'
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, **config.tiles, num_warps=config.num_warps, num_stages=config.num_stages)


def architecture(device: torch.device) -> str:
    """Return the entry of ARCHITECTURES whose configurations suit a device (the newest that is not newer)."""
    if _recording is not None:
        return _recording.architecture
    if device.type != "cuda":
        return "sm_80"  # the interpreter: any configuration will do
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


@cache
def triton_version() -> str | None:
    """Return the version of the distribution that brought Triton, AMD's under another name; None without one."""
    names = metadata.packages_distributions().get("triton")
    return metadata.version(names[0]) if names else None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Return tl.dot's input_precision: fp32 stays fp32 (3xTF32, or plain units where a card has no TF32)."""
    if dtype != torch.float32:
        return "ieee"  # ignored for half precision, but TF32 is refused where a card has none
    return "ieee" if architecture(device).startswith("gfx") or interpreting() else "tf32x3"


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
