"""Launches whose tensors lie between guards: a kernel that writes beside them is seen."""

from typing import Any

import pytest
import torch
from torch import Tensor

from simla_kernels import launching

GUARD, WIDTH = 777, 64


def guard_launches(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[str]:
    """Give every launch of a module copies of its tensors with WIDTH guards on both sides; return what is launched.

    A read beside a tensor gives GUARD, which a result shows; a write beside one fails at once.
    """
    launched = []

    def launch(kernel: Any, grid: tuple[int, ...], config: launching.LaunchConfig, **arguments: Any) -> None:
        copies = {name: _guarded(t) for name, t in arguments.items() if isinstance(t, Tensor)}
        launching.launch(kernel, grid, config, **{**arguments, **{name: inner for name, (_, inner) in copies.items()}})
        launched.append(kernel.__name__)
        for name, (buffer, _) in copies.items():
            outside = torch.cat([buffer[:WIDTH], buffer[-WIDTH:]])
            assert bool((outside == GUARD).all()), f"{kernel.__name__} wrote beside {name}"
            _flat(arguments[name]).copy_(buffer[WIDTH:-WIDTH])

    monkeypatch.setattr(module, "launch", launch)
    return launched


def _guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    flat = _flat(tensor)
    buffer = torch.full((flat.numel() + 2 * WIDTH,), GUARD, dtype=tensor.dtype)
    buffer[WIDTH:-WIDTH] = flat
    return buffer, buffer.as_strided(tensor.shape, tensor.stride(), WIDTH)


def _flat(tensor: Tensor) -> Tensor:
    """Return the memory from a tensor's first to its last element, gaps included."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
