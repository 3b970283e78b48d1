"""What the tests of the linear_soft_* operations share: heads to feed them, how to judge, deliberate mistakes."""

import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from simla_kernels import checking, half, linear_chunks

FP32_TOLERANCE = 1e-5
HALF_FLOOR = 2e-4  # of the largest entry: where PyTorch happens to be exact, ours may still round once


def heads(
    rows: int, width: int = 16, classes: int = 37, *, bias: bool = True, teacher: bool = True, dtype=torch.float32
) -> dict[str, Any]:
    """Return a student's head, whose tensors require gradients, and a teacher's."""
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    def head(wanted: bool) -> dict[str, Any]:
        made = {"h": normal(rows, width), "weight": normal(classes, width, scale=2 * width**-0.5)}
        return {name: x.requires_grad_(wanted) for name, x in made.items()} | {
            "bias": normal(classes).requires_grad_(wanted) if bias else None
        }

    teachers = head(False) if teacher else dict.fromkeys(("h", "weight", "bias"))
    return head(True) | {f"teacher_{name}": x for name, x in teachers.items()}


def assert_exact_in_fp32(function: Callable, reference: Callable, given: dict[str, Any]) -> None:
    """Hold function's loss and gradients against the definition in fp64."""
    truth = checking.results(reference, checking.upcast(given))
    found = checking.results(function, given)
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(truth, torch.float32)
    assert max(checking.errors(found, truth).values()) <= FP32_TOLERANCE


def assert_no_worse_than_torch(function: Callable, reference: Callable, given: dict[str, Any]) -> None:
    """Hold function's error against twice that of the definition in the same low precision."""
    truth = checking.results(reference, checking.upcast(given))
    ours = checking.errors(checking.results(function, given), truth)
    torchs = checking.errors(checking.results(reference, given), truth)
    for name, error in ours.items():
        assert error <= 2 * torchs[name] + HALF_FLOOR, name


def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply half precision as a card does: half operands, fp32 results."""

    def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return out.copy_(a.to(out.dtype) @ b.to(out.dtype))

    def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return out.add_(a.to(out.dtype) @ b.to(out.dtype))

    monkeypatch.setattr(half, "operand_dtype", lambda x: x.dtype)
    for module in (linear_chunks, importlib.import_module("simla_kernels.linear_soft_ce_over_positions")):
        monkeypatch.setattr(module, "product", product)
        monkeypatch.setattr(module, "add_product", add_product)


def mutate(monkeypatch: pytest.MonkeyPatch, function: Callable, old: str, new: str) -> None:
    """Replace a piece of a function's source where its module looks it up."""
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source
    module, made = sys.modules[function.__module__], {}
    exec(source.replace(old, new), module.__dict__, made)
    monkeypatch.setattr(module, function.__name__, made[function.__name__])


def mutated_kernels(module: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """Return a copy of a module of Triton kernels with a piece of its source replaced."""
    source = inspect.getsource(module)
    assert old in source
    path = folder / "mutated_kernels.py"  # Triton reads a kernel's source from its file
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def worst_error(function: Callable, reference: Callable, given: dict[str, Any]) -> float:
    """Return the largest error of a loss or gradient against the definition in fp64."""
    truth = checking.results(reference, checking.upcast(given))
    return max(checking.errors(checking.results(function, given), truth).values())
