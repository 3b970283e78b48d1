"""linear_soft_bce's Triton kernel, interpreted, against the definition in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from simla_kernels import backend, checking, dispatch, linear_chunks
from simla_kernels import linear_soft_bce_triton as kernels
from simla_kernels.linear_soft_bce import linear_soft_bce, linear_soft_bce_reference, row_losses
from tests.kernels.linear_heads import (
    FP32_TOLERANCE,
    as_on_a_card,
    assert_exact_in_fp32,
    assert_no_worse_than_torch,
    heads,
    mutated_kernels,
    worst_error,
)

REDUCTIONS = ["mean", "sum_over_words"]


@pytest.fixture(autouse=True)
def by_triton():
    with dispatch.forced("triton"):
        yield


def inputs(
    rows: int = 5, *, alpha: float = 0.4, reduction: str = "mean", classes: int = 37, most: int = 5, **more: Any
):
    ids = torch.randint(-1, classes, (rows, most), generator=torch.Generator().manual_seed(rows))
    ids[:, -1:] = ids[:, :1]
    ids[:1] = -1  # a row without keywords
    return heads(rows, classes=classes, **more) | {"keyword_ids": ids, "alpha": alpha, "reduction": reduction}


# within a tile; one and a bit; the real vocabulary, two short of a multiple of 16
@pytest.mark.parametrize(
    ("rows", "width", "classes", "reduction"),
    [
        (1, 8, 37, "mean"),
        (30, 16, 37, "sum_over_words"),
        (31, 64, 2049, "mean"),
        (257, 16, 40, "sum_over_words"),
        (2, 8, 30_522, "mean"),
    ],
)
def test_loss_and_gradients_equal_the_definition(rows: int, width: int, classes: int, reduction: str):
    given = inputs(rows, width=width, classes=classes, reduction=reduction)
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("most", [0, 1, 16])
def test_every_option_equals_the_definition(alpha: float, bias: bool, teacher: bool, most: int):
    given = inputs(3, alpha=alpha, bias=bias, teacher=teacher, most=most)
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)


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
        assert_no_worse_than_torch(linear_soft_bce, linear_soft_bce_reference, given)


@pytest.mark.parametrize("level", [-15.0, 0.0, 60.0])  # a rare word: log(1 + 3e-7)
def test_chunks_add_up_digits_are_kept_and_two_runs_agree(level: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 4 * 37 * 4)
    given = inputs(9, reduction="sum_over_words")
    given["bias"] = (given["bias"].detach() + level).requires_grad_()
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)
    first, second = checking.results(linear_soft_bce, given), checking.results(linear_soft_bce, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_rows_cost_nothing_and_move_nothing():
    found = checking.results(linear_soft_bce, inputs(0))
    assert len(found) == 4
    assert all(x.abs().sum() == 0 for x in found.values())


def test_nothing_is_written_beyond_the_rows_and_their_padding():
    generator = torch.Generator().manual_seed(0)
    z, teacher_z = (torch.randn(5, 21, generator=generator) for _ in range(2))
    ids = torch.tensor([[0, 20], [-1, -1], [3, 3], [-1, 0], [5, -1]])
    expected_dz = z.clone()
    expected = row_losses(expected_dz, teacher_z.clone(), ids, 0.4, expected_dz, 1.0)
    buffer, teacher_buffer = (torch.full((7, 48), 7.0) for _ in range(2))  # a guard row before and after
    view, teacher_view = buffer[1:-1, :21], teacher_buffer[1:-1, :21]
    view.copy_(z)
    teacher_view.copy_(teacher_z)
    before = teacher_buffer.clone()
    losses = kernels.row_loss(None, None, ids, 0.4)(view, teacher_view, slice(0, 5), view, 1.0)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(view, expected_dz)
    assert torch.equal(teacher_buffer, before)
    assert (buffer[[0, -1]] == 7).all()
    assert (buffer[:, 32:] == 7).all()  # 21 columns are padded to 32


def test_backend_says_that_triton_runs():
    assert backend("linear_soft_bce", **inputs()).name == "triton"


MUTATIONS = {
    "alpha swapped": ("tl.where(hot, 1 - alpha, 0.0)", "tl.where(hot, alpha, 0.0)"),
    "teacher and student swapped": ("sigmoid_from(t, tl.exp(-tl.abs(t)))", "sigmoid_from(z, tl.exp(-tl.abs(z)))"),
    "padding counted": ("tl.where(at < V,", "tl.where(at < padded_V,"),
    "keywords of another row": ("row * KEYWORDS + k", "k"),
    "teacher's bias left out": ("at, padded_V, HAS_TEACHER_BIAS", "at, padded_V, False"),
    "small exponentials lost": ("return 2 * s * series", "return tl.log(1 + e)"),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    level = -16.5 if name == "small exponentials lost" else 0.0
    given = inputs(3, classes=41, width=8, alpha=0.0 if level else 0.4)
    given["bias"] = (given["bias"].detach() + level).requires_grad_()
    if level:
        given["keyword_ids"].fill_(-1)
    monkeypatch.setattr(kernels, "row_loss", mutated_kernels(kernels, tmp_path, *MUTATIONS[name]).row_loss)
    assert worst_error(linear_soft_bce, linear_soft_bce_reference, given) > 100 * FP32_TOLERANCE
