"""Which implementation of an operation runs: Triton's, or the one in PyTorch. Said aloud, never guessed.

`SIMLA_KERNELS` is auto (default), triton or torch. auto takes Triton on a card, once the operation has passed its
self-check there (simla_kernels.self_check), and PyTorch on a CPU. `SIMLA_KERNELS_STRICT=1` makes an error of every
fallback on a card; without it each is reported in one line, once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simla_kernels.launching import interpreting

MODES = ("auto", "triton", "torch")


class Backend(NamedTuple):
    """The implementation that would run, and why."""

    name: str
    """triton, torch or apex."""
    why: str


@dataclass(frozen=True)
class Operation:
    """What is known of a public function besides itself."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    """The definition, with the same parameters."""
    example: Callable[[int, torch.device, torch.dtype], dict[str, Any]]
    """(size 0..2, device, dtype) -> arguments by name, for the self-check: small, odd sizes, every optional part."""
    refuses: Callable[..., str | None] = lambda *_, **__: None
    """Why Triton's implementation cannot take these arguments (the public function's own); None when it can."""
    torch_only: str = ""
    """Why there is no Triton kernel, where there is none by design."""
    instead: Callable[[Tensor], Backend | None] = lambda tensor: None
    """What else may take PyTorch's place on the tensor's device."""


OPERATIONS: dict[str, Operation] = {}
"""Every public function, by name; each module adds its own when it is imported."""

_forced: str | None = None
_said: set[str] = set()


def register(operation: Operation) -> None:
    """Make an operation known to `backend` and to the self-check."""
    OPERATIONS[operation.function.__name__] = operation


def backend(op: str, *args: Any, **kwargs: Any) -> Backend:
    """Say which implementation of `op` would run for these arguments, and why.

    Args:
        op: name of a public function, such as "cross_attention".
        args, kwargs: its arguments.

    Raises:
        ValueError: an unknown operation; SIMLA_KERNELS asks for Triton where it cannot run.
    """
    if op not in OPERATIONS:
        raise ValueError(f"backend: no operation {op!r}; there are {', '.join(sorted(OPERATIONS))}")
    operation, tensor = OPERATIONS[op], _first_tensor([*args, *kwargs.values()])
    if operation.torch_only:
        return Backend("torch", operation.torch_only)
    chosen = choose(op, tensor, lambda: operation.refuses(*args, **kwargs))
    return chosen if chosen.name == "triton" else operation.instead(tensor) or chosen


def choose(op: str, tensor: Tensor, refusal: Callable[[], str | None]) -> Backend:
    """Decide for one call on `tensor`'s device; `refusal` gives Triton's objection to the arguments."""
    wanted = wish()
    if wanted == "torch":
        return Backend("torch", "SIMLA_KERNELS=torch")
    if wanted == "auto" and tensor.device.type != "cuda":
        return Backend("torch", f"on {tensor.device.type}, where PyTorch's is the fast one")
    absent = _triton_is_absent(tensor)
    if absent and wanted == "triton":
        raise ValueError(f"{op}: SIMLA_KERNELS=triton cannot run here: {absent}; set SIMLA_KERNELS=auto or torch")
    objection = absent or refusal() or (_self_check(op, tensor) if wanted == "auto" else None)
    if objection is None:
        return Backend("triton", "forced" if _forced else f"SIMLA_KERNELS={wanted}")
    if os.environ.get("SIMLA_KERNELS_STRICT") == "1":
        raise ValueError(f"{op}: SIMLA_KERNELS_STRICT=1 and Triton cannot take this call: {objection}")
    _say_once(f"simla_kernels: {op} runs in PyTorch: {objection}")
    return Backend("torch", objection)


def wish() -> str:
    """Return what this context forces, else SIMLA_KERNELS."""
    return _forced or mode()


def mode() -> str:
    """Return SIMLA_KERNELS, checked."""
    wanted = os.environ.get("SIMLA_KERNELS", "auto")
    if wanted not in MODES:
        raise ValueError(f"SIMLA_KERNELS={wanted!r} must be one of {', '.join(MODES)}")
    return wanted


@contextmanager
def forced(wanted: str) -> Iterator[None]:
    """Within this context every operation runs by `wanted` (triton or torch): for checks and benchmarks."""
    global _forced
    before, _forced = _forced, wanted
    try:
        yield
    finally:
        _forced = before


def _triton_is_absent(tensor: Tensor) -> str | None:
    if not _has_triton():
        return "triton is not installed (pip install 'simla_ds[train]')"
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreting()):
        return None
    return f"the tensors are on {tensor.device.type} (TRITON_INTERPRET=1 runs kernels on CPU tensors, slowly)"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _self_check(op: str, tensor: Tensor) -> str | None:
    from simla_kernels.self_check import objection  # it imports this module

    return objection(op, tensor.device)


def _first_tensor(values: list[Any]) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return value[0]
    raise ValueError("backend: give the operation's arguments, at least one tensor among them")


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)
