"""linear_soft_ce_over_positions against its definition in float64, and the published orders of operations."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.head_orders import IGNORED, Head, mlm_official_order, xmm_official_order
from simla_kernels import backend, checking, linear_chunks
from simla_kernels.linear_soft_ce import linear_soft_ce
from simla_kernels.linear_soft_ce_over_positions import (
    linear_soft_ce_over_positions,
    linear_soft_ce_over_positions_reference,
)
from tests.kernels.linear_heads import (
    FP32_TOLERANCE,
    as_on_a_card,
    assert_exact_in_fp32,
    assert_no_worse_than_torch,
    heads,
    mutate,
    worst_error,
)

POSITIONS = importlib.import_module("simla_kernels.linear_soft_ce_over_positions")


def inputs_over_positions(captions: int = 3, length: int = 7, *, alpha: float = 0.4, **more: Any) -> dict:
    given = heads(captions * length, **more)
    generator = torch.Generator().manual_seed(5)
    index = torch.randperm(captions * length, generator=generator)[: captions * length // 3]
    given["h"] = given["h"].detach().view(captions, length, -1).requires_grad_()
    given["teacher_h"] = None if given["teacher_h"] is None else given["teacher_h"][index]
    labels = torch.randint(len(given["weight"]), index.shape, generator=generator)
    return given | {"label_index": index, "labels": labels, "alpha": alpha}


@pytest.mark.parametrize("function", [linear_soft_ce_over_positions_reference, linear_soft_ce_over_positions])
def test_gradients_over_positions_are_the_derivative(function: Any):
    given = checking.upcast(inputs_over_positions(2, 4, width=3, classes=5))
    wanted = ("h", "weight", "bias")
    torch.autograd.gradcheck(
        lambda *x: function(**{**given, **dict(zip(wanted, x, strict=True))}), [given[n] for n in wanted]
    )


@pytest.mark.parametrize("length", [1, 30, 31])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [1, 5])
def test_the_published_loss_equals_its_definition(
    length: int, alpha: float, bias: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
):
    given = inputs_over_positions(3, length, alpha=alpha, bias=bias)
    if bias and alpha == 1:  # its gradient is exactly zero: a softmax over positions does not see it
        given["bias"] = given["bias"].detach()
    if blocks > 1:  # of classes, the last one shorter
        monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 4 * 3 * length * 9)
    assert_exact_in_fp32(linear_soft_ce_over_positions, linear_soft_ce_over_positions_reference, given)


def test_the_published_loss_without_a_teacher_is_the_labels():
    given = inputs_over_positions(teacher=False)
    assert_exact_in_fp32(linear_soft_ce_over_positions, linear_soft_ce_over_positions_reference, given)


def test_the_published_loss_without_labelled_positions_is_zero():
    given = inputs_over_positions()
    given |= {name: given[name][:0] for name in ("teacher_h", "label_index", "labels")}
    found = checking.results(linear_soft_ce_over_positions, given)
    assert len(found) == 4
    assert all(x.abs().sum() == 0 for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_a_card", [False, True])
def test_the_published_loss_in_half_precision_is_no_worse_than_torch(
    dtype: torch.dtype, on_a_card: bool, monkeypatch: pytest.MonkeyPatch
):
    if on_a_card:
        as_on_a_card(monkeypatch)
    given = inputs_over_positions(4, 30, width=64, classes=731, dtype=dtype)
    assert_no_worse_than_torch(linear_soft_ce_over_positions, linear_soft_ce_over_positions_reference, given)


def test_the_operator_is_well_formed():
    arguments = (*inputs_over_positions().values(), [True, True, True])
    torch.library.opcheck(torch.ops.simla_kernels.linear_soft_ce_over_positions.default, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph(compiler: str):
    torch.compiler.reset()
    given = inputs_over_positions()
    compiled = torch.compile(linear_soft_ce_over_positions, fullgraph=True, backend=compiler)
    expected, found = checking.results(linear_soft_ce_over_positions, given), checking.results(compiled, given)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_recomputation_and_repetition_change_nothing():
    given = inputs_over_positions()
    once, twice = (checking.results(linear_soft_ce_over_positions, given) for _ in range(2))
    again = checking.results(
        lambda **x: checkpoint(linear_soft_ce_over_positions, *x.values(), use_reentrant=False), given
    )
    assert all(torch.equal(once[name], twice[name]) and torch.equal(once[name], again[name]) for name in once)


# the published order of operations


def some_masked(given: dict, captions: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which positions are masked (B, L), where they lie, and their labels."""
    masked = torch.rand(captions, length, generator=torch.Generator().manual_seed(1)) < 0.3
    index = masked.flatten().nonzero()[:, 0]
    return masked, index, given["labels"][: len(index)]


def test_the_published_orders_give_the_same_losses():
    given = heads(4 * 16) | {"labels": torch.randint(37, (64,), generator=torch.Generator().manual_seed(3))}
    hidden, teacher_hidden = given["h"].view(4, 16, -1), given["teacher_h"].view(4, 16, -1)
    head, teacher = Head(given["weight"], given["bias"]), Head(given["teacher_weight"], given["teacher_bias"])
    masked, index, labels = some_masked(given, 4, 16)
    rows = [x.index_select(0, index) for x in (given["h"], given["teacher_h"])]
    ours = linear_soft_ce(rows[0], *head, rows[1], *teacher, labels, 0.4)
    xmm = xmm_official_order(hidden, head, teacher_hidden, teacher, masked, labels, 0.4)
    at = torch.full(masked.shape, IGNORED).masked_scatter(masked, labels)
    mlm = mlm_official_order(hidden, head, teacher_hidden, teacher, at, 0.4)
    published = mlm_official_order(hidden, head, teacher_hidden, teacher, at, 0.4, over=1)
    over = linear_soft_ce_over_positions(hidden, *head, rows[1], *teacher, index, labels, 0.4) / len(labels)
    torch.testing.assert_close(torch.stack([ours, ours, over]), torch.stack([xmm, mlm, published]))


POSITION_MUTATIONS = {
    "normalised over words": (POSITIONS._losses_of_classes, "log_softmax(1)", "log_softmax(2)"),
    "alpha swapped": (POSITIONS._losses_of_classes, "hit.to(z.dtype)).mul_(1 - alpha)", "hit.to(z.dtype)).mul_(alpha)"),
    "captions mixed": (
        POSITIONS._losses_of_classes,
        "caption.to(targets.dtype)",
        "torch.ones_like(caption).to(z.dtype)",
    ),
    "gradients accumulated in bf16": (POSITIONS._empty_gradients, "dtype=exact(h.dtype)", "dtype=torch.bfloat16"),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", POSITION_MUTATIONS)
def test_a_broken_head_over_positions_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    functions = linear_soft_ce_over_positions, linear_soft_ce_over_positions_reference
    assert worst_error(*functions, inputs_over_positions()) <= FP32_TOLERANCE
    mutate(monkeypatch, *POSITION_MUTATIONS[name])
    assert worst_error(*functions, inputs_over_positions()) > 100 * FP32_TOLERANCE


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(21, 16)}, r"h \(21, 16\) must be \(B, L, K\)"),
        ({"label_index": torch.zeros(3, dtype=torch.int64)}, r"label_index \(3,\) torch.int64 must be \(M,\)"),
        ({"labels": torch.full((7,), 40)}, r"labels \(7,\) go from 40 to 40; expected 0 to 36"),
        ({"teacher_h": torch.zeros(21, 16)}, r"teacher_h \(21, 16\) must be \(7, K\)"),
        ({"alpha": -1}, "alpha=-1 must be in"),
    ],
)
def test_what_does_not_belong_together_over_positions_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"linear_soft_ce_over_positions: .*{message}"):
        linear_soft_ce_over_positions(**{**inputs_over_positions(), **change})


def test_backend_says_what_runs():
    assert backend("linear_soft_ce_over_positions", **inputs_over_positions()).name == "torch"
