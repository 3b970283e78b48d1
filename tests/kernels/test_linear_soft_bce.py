"""linear_soft_bce against its definition in float64."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from simla_kernels import backend, checking, linear_chunks
from simla_kernels.linear_soft_bce import linear_soft_bce, linear_soft_bce_reference
from tests.kernels.linear_heads import (
    FP32_TOLERANCE,
    as_on_a_card,
    assert_exact_in_fp32,
    assert_no_worse_than_torch,
    heads,
    mutate,
    worst_error,
)

MODULE = importlib.import_module("simla_kernels.linear_soft_bce")
REDUCTIONS = ["mean", "sum_over_words"]
WANTED = ("h", "weight", "bias")


def keywords(rows: int, classes: int, most: int = 5) -> torch.Tensor:
    """Return ids with duplicates, absent ones first, between and last, id 0 beside -1, and a row without any."""
    ids = torch.randint(-1, classes, (rows, most), generator=torch.Generator().manual_seed(rows))
    if most > 1:
        ids[:, -1] = ids[:, 0]
        ids[0], ids[-1, 0], ids[-1, 1] = -1, -1, 0
    return ids


def inputs(
    rows: int = 31, *, alpha: float = 0.4, reduction: str = "mean", classes: int = 37, most: int = 5, **more: Any
):
    head = heads(rows, classes=classes, **more)
    return head | {"keyword_ids": keywords(rows, classes, most), "alpha": alpha, "reduction": reduction}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [linear_soft_bce_reference, linear_soft_bce])
def test_gradients_are_the_derivative(function: Any, reduction: str):
    given = checking.upcast(inputs(5, width=3, classes=7, reduction=reduction))
    torch.autograd.gradcheck(
        lambda *x: function(**{**given, **dict(zip(WANTED, x, strict=True))}), [given[name] for name in WANTED]
    )


# one row; odd on purpose; more rows than the width, where the weight's gradient is made in forward
@pytest.mark.parametrize("rows", [1, 30, 31, 257])
@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_equal_the_definition(rows: int, width: int, reduction: str):
    given = inputs(rows, width=width, classes=731, reduction=reduction)
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("most", [0, 1, 16])
def test_every_option_equals_the_definition(alpha: float, bias: bool, teacher: bool, most: int):
    given = inputs(alpha=alpha, bias=bias, teacher=teacher, most=most)
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)


def test_absent_ids_count_nothing_and_repeated_ones_once():
    given = inputs(3, alpha=0.0)
    given["keyword_ids"] = torch.tensor([[4, 9, 4, -1], [-1, 9, 4, 9], [4, 4, 9, 9]])
    repeated = checking.results(linear_soft_bce, given)
    given["keyword_ids"] = torch.tensor([[4, 9], [4, 9], [9, 4]])
    once = checking.results(linear_soft_bce, given)
    assert all(torch.equal(repeated[name], once[name]) for name in once)


def test_the_mixture_is_the_sum_of_two_cross_entropies():
    given = inputs()
    logits, soft = (F.linear(given[f"{of}h"], given[f"{of}weight"], given[f"{of}bias"]) for of in ("", "teacher_"))
    hot = torch.zeros(31, 38).scatter_(1, given["keyword_ids"] % 38, 1.0)[:, :37]  # -1 goes to a column beyond
    terms = [F.binary_cross_entropy_with_logits(logits, target) for target in (hot, soft.sigmoid())]
    torch.testing.assert_close(linear_soft_bce(**given), 0.6 * terms[0] + 0.4 * terms[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, reduction: str):
    for rows in (30, 257):
        given = inputs(rows, width=64, classes=731, reduction=reduction, dtype=dtype)
        assert_no_worse_than_torch(linear_soft_bce, linear_soft_bce_reference, given)


def test_logits_far_from_zero_keep_their_digits():
    given = inputs(reduction="sum_over_words")
    for name in ("bias", "teacher_bias"):
        given[name] = (given[name].detach() * 40).requires_grad_(name == "bias")
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)
    given["bias"] = torch.full((37,), -15.0).requires_grad_()  # a rare word: log(1 + 3e-7)
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunks_of_rows_and_blocks_of_classes_add_up(reduction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 4 * 37 * 12)
    monkeypatch.setattr(linear_chunks, "CPU_BLOCK", 10)
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, inputs(reduction=reduction))


def test_any_strides_will_do():
    given = inputs(257)
    for name in ("h", "weight", "teacher_h", "teacher_weight"):
        given[name] = given[name].detach().t().contiguous().t().requires_grad_(not name.startswith("teacher"))
    given["keyword_ids"] = given["keyword_ids"].t().contiguous().t()
    assert_exact_in_fp32(linear_soft_bce, linear_soft_bce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_cost_nothing_and_move_nothing(reduction: str):
    given = inputs(1, reduction=reduction)
    given = {n: x[:0] if n in ("h", "teacher_h", "keyword_ids") else x for n, x in given.items()}
    loss = linear_soft_bce(**given)
    gradients = torch.autograd.grad(loss, [given[name] for name in WANTED])
    assert loss == 0
    assert all(x.abs().sum() == 0 for x in gradients)


@pytest.mark.parametrize("rows", [10, 257])  # dz kept; the weight's gradient made in forward
def test_backward_does_not_read_the_weight_and_repeats_itself(rows: int):
    given = inputs(rows)
    wanted = [given[name] for name in WANTED]
    before = torch.autograd.grad(linear_soft_bce(**given), wanted)
    loss = linear_soft_bce(**given)
    given["weight"].data.fill_(float("nan"))  # ZeRO-3 has taken it away
    for _ in range(2):
        assert all(map(torch.equal, before, torch.autograd.grad(loss, wanted, retain_graph=True)))


@pytest.mark.parametrize("on_a_card", [False, True])
@pytest.mark.parametrize("rows", [10, 257])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_scale_of_65536_neither_overflows_nor_underflows(
    rows: int, reduction: str, on_a_card: bool, monkeypatch: pytest.MonkeyPatch
):
    given = inputs(rows, classes=731, dtype=torch.float16, reduction=reduction)
    exact = checking.upcast(given)
    share = 1 / 4096 if reduction == "sum_over_words" else 1.0
    truth = torch.autograd.grad(linear_soft_bce_reference(**exact) * share, [exact[name] for name in WANTED])
    if on_a_card:
        as_on_a_card(monkeypatch)
    found = torch.autograd.grad(linear_soft_bce(**given) * (share * 65536), [given[name] for name in WANTED])
    for true, x in zip(truth, found, strict=True):
        assert (x.double() / 65536 - true).abs().max() <= 2e-3 * true.abs().max()


def test_the_operator_is_well_formed():
    for rows in (5, 40):  # dz kept or not
        given = inputs(rows, width=8, classes=11)
        arguments = (*list(given.values())[:-1], [True, True, True])
        torch.library.opcheck(torch.ops.simla_kernels.linear_soft_bce_sum.default, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph(compiler: str):
    torch.compiler.reset()
    compiled = torch.compile(linear_soft_bce, fullgraph=True, backend=compiler)
    for rows in (5, 40):
        given = inputs(rows)
        expected, found = checking.results(linear_soft_bce, given), checking.results(compiled, given)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_recomputation_changes_nothing():
    given = inputs()
    again = checking.results(lambda **x: checkpoint(linear_soft_bce, *x.values(), use_reentrant=False), given)
    once = checking.results(linear_soft_bce, given)
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_only_wanted_gradients_are_made():
    given = inputs()
    every = checking.results(linear_soft_bce, given)
    given["weight"] = given["weight"].detach()
    some = checking.results(linear_soft_bce, given)
    assert some.keys() == {"out0", "grad.h", "grad.bias"}
    assert all(torch.equal(some[name], every[name]) for name in some)
    with torch.no_grad():
        assert torch.equal(linear_soft_bce(**given), every["out0"])


# mistakes made on purpose

MUTATIONS = {
    "alpha swapped": (MODULE.row_losses, "hard = (1 - alpha)", "hard = alpha"),
    "teacher and student swapped": (MODULE.torch_row_loss, "row_losses(z, teacher_z,", "row_losses(teacher_z, z,"),
    "softmax for the teacher": (MODULE.row_losses, "teacher_z.sigmoid_()", "teacher_z.softmax(-1)"),
    "duplicates counted twice": (
        MODULE.row_losses,
        ".scatter_(1, ids, target.gather(1, ids) + hard)",
        ".scatter_add_(1, ids, hard.expand(ids.shape))",
    ),
    "-1 taken for id 0": (MODULE.row_losses, "largest >= 0", "largest >= -1"),
    "teacher's bias left out": (MODULE.torch_row_loss, "teacher_z, teacher_bias)", "teacher_z, None)"),
    "target left out of the gradient": (MODULE.row_losses, ".sub_(target)", ""),
    "gradients accumulated in bf16": (linear_chunks.empty_gradients, "= exact(h.dtype),", "= torch.bfloat16,"),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_head_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    assert worst_error(linear_soft_bce, linear_soft_bce_reference, inputs()) <= FP32_TOLERANCE
    mutate(monkeypatch, *MUTATIONS[name])
    assert worst_error(linear_soft_bce, linear_soft_bce_reference, inputs()) > 100 * FP32_TOLERANCE


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(31)}, r"h \(31,\) must be \(N, K\)"),
        ({"h": torch.zeros(31, 16, dtype=torch.int64)}, r"h \(31, 16\) torch.int64 must be floating"),
        ({"weight": torch.zeros(37, 8)}, r"weight \(37, 8\) torch.float32 must be \(V, 16\) torch.float32 like h"),
        ({"bias": torch.zeros(36)}, r"bias \(36,\) torch.float32 must be \(37,\)"),
        ({"teacher_h": torch.zeros(30, 16)}, r"teacher_h \(30, 16\) must be \(31, K\)"),
        ({"teacher_h": None}, "teacher_h is missing"),
        ({"keyword_ids": torch.zeros(31, 65, dtype=torch.int64)}, r"keyword_ids \(31, 65\) .* \(31, at most 64\)"),
        ({"keyword_ids": torch.zeros(30, 5, dtype=torch.int64)}, r"keyword_ids \(30, 5\) torch.int64 must be \(31,"),
        ({"keyword_ids": torch.zeros(31, dtype=torch.int64)}, r"keyword_ids \(31,\)"),
        ({"keyword_ids": torch.zeros(31, 5)}, r"keyword_ids \(31, 5\) torch.float32 must be .* torch.int64"),
        (
            {"keyword_ids": torch.full((31, 5), 37)},
            r"keyword_ids \(31, 5\) go from 37 to 37; expected -1 \(none\) to 36",
        ),
        ({"keyword_ids": torch.full((31, 5), -2)}, r"keyword_ids \(31, 5\) go from -2 to -2"),
        ({"keyword_ids": torch.zeros(31, 5, dtype=torch.int64, device="meta")}, r"keyword_ids \(31, 5\) is on meta"),
        ({"alpha": -0.1}, r"alpha=-0.1 must be in \[0, 1\]"),
        ({"reduction": "sum"}, "reduction='sum' must be one of mean, sum_over_words"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"linear_soft_bce: .*{message}"):
        linear_soft_bce(**{**inputs(), **change})


def test_backend_says_what_runs():
    assert backend("linear_soft_bce", **inputs()).name == "torch"
