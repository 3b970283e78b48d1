"""linear_soft_ce's Triton kernel, interpreted, against the definition in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simla_kernels import backend, checking, dispatch, linear_chunks
from simla_kernels import linear_soft_ce_triton as kernels
from simla_kernels.linear_soft_ce import linear_soft_ce, linear_soft_ce_reference, row_losses
from tests.kernels.linear_heads import (
    FP32_TOLERANCE,
    as_on_a_card,
    assert_exact_in_fp32,
    assert_no_worse_than_torch,
    heads,
    mutated_kernels,
    worst_error,
)

REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def by_triton():
    with dispatch.forced("triton"):
        yield


def inputs(rows: int = 5, *, alpha: float = 0.4, reduction: str = "mean", classes: int = 37, **more: Any) -> dict:
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))
    return heads(rows, classes=classes, **more) | {"labels": labels, "alpha": alpha, "reduction": reduction}


# within a tile; one and a bit; the real vocabulary, two short of a multiple of 16
@pytest.mark.parametrize(
    ("rows", "width", "classes", "reduction"),
    [
        (1, 8, 37, "mean"),
        (30, 16, 37, "none"),
        (31, 64, 2049, "sum"),
        (257, 16, 40, "none"),
        (2, 8, 30_522, "sum"),
    ],
)
def test_loss_and_gradients_equal_the_definition(rows: int, width: int, classes: int, reduction: str):
    given = inputs(rows, width=width, classes=classes, reduction=reduction)
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_option_equals_the_definition(alpha: float, bias: bool, teacher: bool, reduction: str):
    given = inputs(3, alpha=alpha, bias=bias, teacher=teacher, reduction=reduction)
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_a_card", [False, True])  # half products, as there
def test_half_precision_is_no_worse_than_torch(
    dtype: torch.dtype, reduction: str, on_a_card: bool, monkeypatch: pytest.MonkeyPatch
):
    if on_a_card:
        as_on_a_card(monkeypatch)
    for rows in (7, 31):  # dz kept or not
        given = inputs(rows, width=16, classes=731, reduction=reduction, dtype=dtype)
        assert_no_worse_than_torch(linear_soft_ce, linear_soft_ce_reference, given)


def test_chunks_add_up_large_logits_fit_and_two_runs_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 4 * 37 * 4)
    given = inputs(9)
    given["bias"] = (given["bias"].detach() * 300).requires_grad_()
    given["teacher_bias"] = given["teacher_bias"] * 300
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)
    first, second = checking.results(linear_soft_ce, given), checking.results(linear_soft_ce, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_cost_nothing_and_move_nothing(reduction: str):
    found = checking.results(linear_soft_ce, inputs(0, reduction=reduction))
    assert len(found) == 4
    assert all(x.abs().sum() == 0 for x in found.values())


def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a buffer with a guard row before and after x, rows 48 apart, and the view of it that holds x."""
    buffer = torch.full((len(x) + 2, 48), 7.0)
    view = buffer[1:-1, : x.shape[1]]
    view.copy_(x)
    return buffer, view


def test_nothing_is_written_beyond_the_rows_and_their_padding():
    generator = torch.Generator().manual_seed(0)
    z, teacher_z = (torch.randn(5, 21, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 20, 7, 7, 3])
    expected_dz = z.clone()
    expected = row_losses(expected_dz, teacher_z.clone(), labels, 0.4, None, expected_dz, 1.0)
    (buffer, z), (teacher_buffer, teacher_z) = guarded(z), guarded(teacher_z)
    before = teacher_buffer.clone()
    losses = kernels.row_loss(None, None, labels, 0.4, None)(z, teacher_z, slice(0, 5), z, 1.0)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(z, expected_dz)
    assert torch.equal(teacher_buffer, before)
    assert (buffer[[0, -1]] == 7).all()
    assert (buffer[:, 32:] == 7).all()  # 21 columns are padded to 32
    assert (buffer[1:-1, 21:32] == 0).all()


def test_a_label_out_of_range_is_visible():
    z = torch.zeros(3, 48)[:, :37]
    losses = kernels.row_loss(None, None, torch.tensor([0, 37, -100]), 0.4, None)(z, None, slice(0, 3), None, 1.0)
    assert losses.isnan().tolist() == [False, True, True]


def test_backend_says_that_triton_runs_and_what_it_refuses():
    assert backend("linear_soft_ce", **inputs()).name == "triton"
    found = backend("linear_soft_ce", **checking.upcast(inputs()))
    assert found == ("torch", "h is torch.float64; the kernels take float32, bfloat16 and float16")


MUTATIONS = {
    "alpha swapped": ("lse - (1 - alpha) * picked", "lse - alpha * picked"),
    "teacher and student swapped": ("share * tl.exp(t - teacher_largest)", "share * tl.exp(z - largest)"),
    "teacher's bias left out": ("at, V, padded_V, HAS_TEACHER_BIAS", "at, V, padded_V, False"),
    "sum not rescaled": ("total * tl.exp(largest - new)", "total"),
    "padding counted": ("tl.where(columns < V, z, -float(\"inf\"))", "z"),
    "row's factor left out": ("factor *= tl.load", "factor = factor + 0 * tl.load"),
}  # fmt: skip


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = inputs(3, classes=2057, width=8, reduction="none")  # a tile and a bit
    given["bias"] = torch.arange(2057).eq(2056).mul(12.0).requires_grad_()  # the largest logit comes last
    monkeypatch.setattr(kernels, "row_loss", mutated_kernels(kernels, tmp_path, *MUTATIONS[name]).row_loss)
    assert worst_error(linear_soft_ce, linear_soft_ce_reference, given) > 100 * FP32_TOLERANCE
