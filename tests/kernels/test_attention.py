"""cross_attention against its definition in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from simla_kernels import cross_attention, cross_attention_reference

# one row; a caption; a caption, odd on purpose; 16 x 16 patches and [CLS], where SDPA takes over on a CPU
LENGTHS = [1, 30, 31, 257]
attend: Any = cross_attention  # returns a tensor or, asked for [CLS], a pair
TOLERANCE = 2e-6  # fp32 at order-one values; 7e-7 was measured


def make_inputs(queries: int, keys: int, *, rows: int = 2, key_rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 2, queries, 8), (key_rows, 2, keys, 8), (key_rows, 2, keys, 8))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def assert_equals_definition(tensors: Sequence[Tensor], mask: Tensor | None, index: Tensor | None = None) -> None:
    """Compare outputs, [CLS] rows and all gradients with the definition's in float64."""
    tensors, exact = list(tensors), [t.detach().double().requires_grad_() for t in tensors]
    wanted, wanted_row = cross_attention_reference(exact[0], exact[1], exact[2], mask, index)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted_gradients = torch.autograd.grad(wanted, exact, direction)
    for return_cls_row in (False, True):
        out = attend(*tensors, mask, index, return_cls_row=return_cls_row)
        if isinstance(out, tuple):
            torch.testing.assert_close(out[1].double(), wanted_row, atol=TOLERANCE, rtol=0)
            assert out[1].dtype == torch.float32
            out = out[0]
        torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE, rtol=0)
        for mine, theirs in zip(torch.autograd.grad(out, tensors, direction.float()), wanted_gradients, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=2 * TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("queries", LENGTHS)
def test_output_and_gradients_equal_the_definition(queries: int, keys: int):
    assert_equals_definition(make_inputs(queries, keys), None)


@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (30, 31), (257, 30), (257, 257)])  # both CPU paths
def test_masked_keys_are_not_read_and_a_row_without_keys_reads_all_evenly(queries: int, keys: int):
    tensors = make_inputs(queries, keys, rows=3, key_rows=3)
    mask = torch.rand(3, keys, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0, 0], mask[1] = True, False
    assert_equals_definition(tensors, mask)
    out, row = attend(*tensors, mask, return_cls_row=True)
    even = tensors[2][1].mean(1, keepdim=True).expand(-1, queries, -1)
    torch.testing.assert_close(out[1], even, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(row[1], torch.full_like(row[1], 1 / keys))
    poisoned = [tensors[0], *(t.masked_fill(~mask[:, None, :, None], 1e4) for t in tensors[1:])]
    visible = [0, 2]
    torch.testing.assert_close(
        attend(*poisoned, mask)[visible], attend(*tensors, mask)[visible], atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(("queries", "keys"), [(30, 31), (257, 257)])  # both CPU paths
def test_gradients_of_a_shared_key_row_are_summed_over_the_rows_that_read_it(queries: int, keys: int):
    tensors = make_inputs(queries, keys, rows=5, key_rows=3)
    index = torch.tensor([2, 0, 2, 2, 0])  # row 1 is read by none
    mask = torch.rand(3, keys, generator=torch.Generator().manual_seed(3)) > 0.4
    assert_equals_definition(tensors, mask, index)
    out = attend(*tensors, mask, index)
    assert isinstance(out, Tensor)
    shared = torch.autograd.grad(out.square().sum(), tensors[1:])
    repeated = [t.detach()[index].requires_grad_() for t in tensors[1:]]
    out = attend(tensors[0], *repeated, mask[index])
    assert isinstance(out, Tensor)
    for mine, copies in zip(shared, torch.autograd.grad(out.square().sum(), repeated), strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine).index_add(0, index, copies), atol=1e-5, rtol=1e-5)
        assert not mine[1].any()


def test_the_cls_row_is_not_dropped_out_and_stays_float32_in_bfloat16():
    tensors = [t.detach().bfloat16() for t in make_inputs(30, 31)]
    out, row = attend(*tensors, dropout_p=0.9, return_cls_row=True)
    _, wanted = cross_attention_reference(*(t.double() for t in tensors))
    assert out.dtype == torch.bfloat16
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.sum(-1), torch.ones(2, 2))
    # scores are rounded to bfloat16 (8 bits) before the softmax: 2^-8 of a score of at most 3
    torch.testing.assert_close(row.double(), wanted, atol=1e-2, rtol=2e-2)


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4)  # all weights 1/200
    v = torch.ones(1, 1, 200, 4)
    torch.manual_seed(0)
    out = attend(q, k, v, dropout_p=0.25)
    assert isinstance(out, Tensor)
    kept = out[0, 0, :, 0] * 0.75  # share of 200 weights that were kept
    assert kept.std() > 0.01
    assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / 200 / 200) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 3)}, r"q \(2, 2, 3\)"),
        ({"v": torch.zeros(2, 2, 5, 8)}, r"v \(2, 2, 5, 8\)"),
        ({"q": torch.zeros(2, 4, 3, 8)}, r"q \(2, 4, 3, 8\), k \(2, 2, 4, 8\)"),
        ({"key_mask": torch.ones(2, 4)}, r"key_mask \(2, 4\) torch.float32 must be \(2, 4\) torch.bool"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask \(2, 3\) torch.bool must be \(2, 4\)"),
        ({"q": torch.zeros(3, 2, 3, 8)}, r"k has 2 rows for 3 of q; give kv_index \(3,\)"),
        ({"kv_index": torch.zeros(3, dtype=torch.long)}, r"kv_index \(3,\) must be \(2,\)"),
    ],
    ids=["three dims", "k and v differ", "heads differ", "float mask", "mask length", "rows differ", "index length"],
)
def test_shapes_that_do_not_belong_together_are_refused_with_both(change: dict[str, Tensor], message: str):
    arguments = {"q": torch.zeros(2, 2, 3, 8), "k": torch.zeros(2, 2, 4, 8), "v": torch.zeros(2, 2, 4, 8)}
    with pytest.raises(ValueError, match=message):
        attend(**{**arguments, **change})
