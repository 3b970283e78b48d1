"""Triton's kernels on a real card: the self-check of every operation, and the sizes that training runs at."""

from typing import Any

import pytest
import torch

from simla_kernels import checking, cross_attention, cross_attention_reference, dispatch, linear_soft_ce, self_check
from simla_kernels import linear_soft_ce_reference as soft_ce_reference

pytestmark = pytest.mark.gpu
WITH_KERNELS = sorted(name for name, operation in dispatch.OPERATIONS.items() if not operation.torch_only)
HALF_TOLERANCE = 3e-2  # of a result's largest entry: bfloat16 keeps 8 bits


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device="cuda")).bfloat16().requires_grad_()


def assert_agrees(function: Any, reference: Any, arguments: dict[str, Any]) -> None:
    truth = checking.results(reference, checking.upcast(arguments, torch.float32))
    with dispatch.forced("triton"):
        first, second = checking.results(function, arguments), checking.results(function, arguments)
    assert max(checking.errors(first, truth).values()) <= HALF_TOLERANCE
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_an_operation_passes_its_self_check(op: str):
    assert self_check.failure(op, torch.device("cuda")) is None


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_auto_runs_triton_here(op: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SIMLA_KERNELS_STRICT", "1")
    arguments = dispatch.OPERATIONS[op].example(1, torch.device("cuda"), torch.bfloat16)
    assert dispatch.backend(op, **arguments).name in ("triton", "apex")


@pytest.mark.parametrize(("queries", "keys", "rows"), [(30, 257, 64), (257, 30, 16), (257, 257, 16)])
def test_attention_at_training_sizes(queries: int, keys: int, rows: int):
    index = torch.arange(rows, device="cuda") % 16
    q, k, v = normal(rows, 12, queries, 64), normal(16, 12, keys, 64), normal(16, 12, keys, 64)
    assert_agrees(cross_attention, cross_attention_reference, {"q": q, "k": k, "v": v, "kv_index": index})


@pytest.mark.parametrize(("rows", "classes"), [(1200, 8192), (72, 30_522)])  # XMM's and MLM's heads
def test_heads_at_training_sizes(rows: int, classes: int):
    heads = [normal(classes, 768, scale=0.05) for _ in range(2)]
    arguments = {
        "h": normal(rows, 768),
        "weight": heads[0],
        "bias": normal(classes),
        "teacher_h": normal(rows, 768).detach(),
        "teacher_weight": heads[1].detach(),
        "teacher_bias": None,
        "labels": torch.randint(classes, (rows,), device="cuda"),
        "alpha": 0.4,
    }
    assert_agrees(linear_soft_ce, soft_ce_reference, arguments)
