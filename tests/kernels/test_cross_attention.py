"""cross_attention and cross_attention_varlen in PyTorch, against their definitions in float64."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simla_kernels import (
    checking,
    cross_attention,
    cross_attention_reference,
    cross_attention_varlen,
    cross_attention_varlen_reference,
)

MODULE: Any = importlib.import_module("simla_kernels.cross_attention")
# one row; a caption; a caption, odd on purpose; 16 x 16 patches and [CLS], where SDPA takes over on a CPU
LENGTHS = [1, 30, 31, 257]
TOLERANCE = 1e-5  # of a result's largest entry; 2e-6 was measured
attend: Any = cross_attention  # returns a tensor or, asked for [CLS], a pair


@pytest.fixture(autouse=True, params=["AVX2", "AVX512"])
def _on_either_kind_of_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Which of the two paths a caption takes depends on the CPU, and what half precision is multiplied in; all run."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: request.param)
    monkeypatch.setattr("simla_kernels.half.has_bf16_units", lambda: request.param == "AVX512")


def tokens(rows: int, length: int, seed: int, dim: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, 2, length, dim) as a linear layer leaves it: not contiguous."""
    t = torch.randn(rows, length, 2, dim, generator=torch.Generator().manual_seed(seed))
    return t.to(dtype).transpose(1, 2).requires_grad_()


def inputs(queries: int, keys: int, *, rows: int = 2, key_rows: int = 2, **more: Any) -> dict[str, Any]:
    dim, dtype = more.pop("dim", 8), more.pop("dtype", torch.float32)
    q = tokens(rows, queries, 0, dim, dtype)
    k, v = tokens(key_rows, keys, 1, dim, dtype), tokens(key_rows, keys, 2, dim, dtype)
    return {"q": q, "k": k, "v": v, **more}


def some_mask(rows: int, keys: int) -> Tensor:
    mask = torch.rand(rows, keys, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0] = torch.arange(keys) == 0  # all but [CLS] hidden
    mask[-1] = False  # no key at all
    return mask


def assert_agrees(
    arguments: dict[str, Any], function: Callable = cross_attention, reference: Callable = cross_attention_reference
) -> None:
    truth = checking.results(reference, checking.upcast(arguments))
    for name, error in checking.errors(checking.results(function, arguments), truth).items():
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("cls_row", [False, True])
@pytest.mark.parametrize(("queries", "keys"), list(itertools.product(LENGTHS, LENGTHS)))
def test_output_and_gradients_equal_the_definition(queries: int, keys: int, cls_row: bool):
    assert_agrees(inputs(queries, keys, return_cls_row=cls_row))


@pytest.mark.parametrize("dim", [8, 16, 24, 64])
def test_any_head_size(dim: int):
    assert_agrees(inputs(31, 30, dim=dim))


@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (30, 31), (257, 30), (257, 257)])  # both CPU paths
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_masks_shared_keys_and_dropout_together(queries: int, keys: int, dropout_p: float):
    mask, index = some_mask(3, keys), torch.tensor([2, 0, 2, 2, 0])  # row 1 is read by none
    more = {"key_mask": mask, "dropout_p": dropout_p, "seed": 7, "return_cls_row": True}
    assert_agrees(inputs(queries, keys, rows=5, key_rows=3, kv_index=index, **more))
    assert_agrees(inputs(queries, keys, rows=3, key_rows=3, **more))


def test_the_reference_passes_gradcheck():
    arguments = checking.upcast(inputs(3, 4, rows=3, dim=2))
    mask, index = torch.tensor([[True, True, False, True], [True, False, False, False]]), torch.tensor([1, 0, 1])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return cross_attention_reference(q, k, v, mask, index, 0.4, 3)

    assert torch.autograd.gradcheck(run, tuple(arguments.values()))


def test_masked_keys_are_not_read_and_a_row_without_keys_reads_all_evenly():
    given = inputs(30, 31, rows=3, key_rows=3, key_mask=some_mask(3, 31), return_cls_row=True)
    out, row = attend(**given)
    even = given["v"][2].mean(1, keepdim=True).expand(-1, 30, -1)
    torch.testing.assert_close(out[2], even, atol=2e-6, rtol=0)
    torch.testing.assert_close(row[2], torch.full_like(row[2], 1 / 31))
    hidden = ~given["key_mask"][:, None, :, None]
    poisoned = {**given, "k": given["k"].masked_fill(hidden, 1e4), "v": given["v"].masked_fill(hidden, 1e4)}
    torch.testing.assert_close(attend(**poisoned)[0][:2], out[:2], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(30, 257), (257, 30), (257, 257)])
def test_half_precision_is_no_worse_than_twice_pytorchs(queries: int, keys: int, dtype: torch.dtype):
    index = torch.tensor([0, 1, 1, 0, 1, 1])
    arguments = inputs(queries, keys, rows=6, dtype=dtype, dim=16, kv_index=index)
    truth = checking.results(cross_attention_reference, checking.upcast(arguments))
    theirs = checking.errors(checking.results(cross_attention_reference, arguments), truth)
    mine = checking.errors(checking.results(cross_attention, arguments), truth)
    for name, error in mine.items():
        assert error <= 2 * theirs[name], f"{name}: {error:.1e}, PyTorch {theirs[name]:.1e}"


def test_the_cls_row_is_float32_in_any_precision_and_never_dropped():
    given = inputs(30, 31, dtype=torch.bfloat16)
    _, row = attend(**given, dropout_p=0.9, return_cls_row=True)
    exact = {name: t.detach().double() for name, t in given.items()}
    wanted = cross_attention_reference(**exact, return_cls_row=True)[1]
    assert row.dtype == torch.float32
    assert not row.requires_grad
    torch.testing.assert_close(row.double(), wanted, atol=1e-6, rtol=0)


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4)  # all weights 1/200
    kept = attend(q, k, torch.ones(1, 1, 200, 4), dropout_p=0.25, seed=0)[0, 0, :, 0] * 0.75
    assert kept.std() > 0.01
    assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / 200 / 200) ** 0.5


def test_dropout_follows_from_its_seed_and_else_from_torch_manual_seed():
    given = inputs(30, 31, dropout_p=0.5)
    assert torch.equal(attend(**given, seed=3), attend(**given, seed=torch.tensor([3])))
    assert not torch.equal(attend(**given, seed=3), attend(**given, seed=4))
    torch.manual_seed(1)
    first, second = attend(**given), attend(**given)
    torch.manual_seed(1)
    assert torch.equal(attend(**given), first)
    assert not torch.equal(first, second)


# packed sequences


def packed(lengths: list[int], key_lengths: list[int], **more: Any) -> dict[str, Any]:
    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(counts)])

    q, k, v = (
        t[0].transpose(0, 1).detach().requires_grad_()
        for t in (tokens(1, sum(lengths), 0), tokens(1, sum(key_lengths), 1), tokens(1, sum(key_lengths), 2))
    )
    longest = {"max_q": max(lengths), "max_k": max(key_lengths)}
    return {"q": q, "k": k, "v": v, "cu_q": starts(lengths), "cu_k": starts(key_lengths), **longest, **more}


@pytest.mark.parametrize(
    ("lengths", "key_lengths", "index"),
    [
        ([1], [1], None),
        ([30, 1, 17], [30, 1, 17], None),
        ([3, 5, 1], [7, 0, 31], None),  # a row without keys
        ([3, 0, 5], [2, 4, 1], None),  # a row without queries
        ([5, 5], [31, 31], None),  # nothing to pad
        ([131, 131, 131], [7, 7, 7], None),
        ([30, 9, 25, 11], [257, 257], [1, 1, 0, 1]),  # captions over shared pictures
    ],
)
def test_packed_rows_equal_the_definition(lengths: list[int], key_lengths: list[int], index: list[int] | None):
    arguments = packed(lengths, key_lengths, kv_index=None if index is None else torch.tensor(index))
    for more in ({}, {"return_cls_row": True}):
        assert_agrees({**arguments, **more}, cross_attention_varlen, cross_attention_varlen_reference)


def test_packed_rows_equal_dense_ones_with_dropout():
    arguments = packed([4, 4, 4], [6, 6, 6], dropout_p=0.4, seed=5)
    dense = {n: arguments[n].unflatten(0, (3, -1)).transpose(1, 2) for n in ("q", "k", "v")}
    wanted = attend(**dense, key_mask=torch.ones(3, 6, dtype=torch.bool), dropout_p=0.4, seed=5)
    found: Any = cross_attention_varlen(**arguments)
    torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(0, 1))


# what PyTorch asks of an operation


@pytest.mark.parametrize("op", ["cross_attention", "cross_attention_varlen"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck_passes(op: str, dropout_p: float):
    seed = torch.tensor([3])
    if op == "cross_attention":
        given = inputs(3, 5, rows=3, key_mask=some_mask(2, 5), kv_index=torch.tensor([1, 0, 1]))
        arguments = (*given.values(), dropout_p, seed, True)
    else:
        arguments = (*packed([3, 1], [4, 2]).values(), None, dropout_p, seed, True)
    operation = getattr(torch.ops.simla_kernels, op).default
    if op == "cross_attention_varlen":  # rows of one length, which are not padded
        torch.library.opcheck(operation, (*packed([2, 2], [4, 4]).values(), None, dropout_p, seed, True))
    torch.library.opcheck(operation, arguments)
    torch.library.opcheck(operation, tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_path_passes_opcheck(dtype: torch.dtype):
    given = inputs(130, 129, dtype=dtype)
    torch.library.opcheck(
        torch.ops.simla_kernels.cross_attention.default,
        (*given.values(), None, None, 0.0, torch.tensor([0]), False),
    )


def test_it_compiles_as_one_graph():
    given = inputs(30, 31, key_mask=some_mask(2, 31), dropout_p=0.2, seed=5)

    def run(**arguments: Any) -> Tensor:
        return attend(**arguments).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, wanted = checking.results(compiled, given), checking.results(run, given)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_activation_checkpointing_draws_the_same_mask():
    given = inputs(30, 31, dropout_p=0.5)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q, k, v, dropout_p=0.5).sin()

    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        tensors = (given["q"], given["k"], given["v"])
        out = checkpoint(run, *tensors, use_reentrant=False) if wrapped else run(*tensors)
        assert isinstance(out, Tensor)
        gradients.append(torch.autograd.grad(out.sum(), tensors))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("size", [(30, 31), (257, 257)])
def test_two_backward_passes_are_bit_identical(size: tuple[int, int]):
    given = inputs(*size, rows=6, key_rows=2, kv_index=torch.tensor([0, 1, 1, 0, 1, 1]))
    first, second = checking.results(cross_attention, given), checking.results(cross_attention, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_are_only_made_where_they_are_wanted():
    given = inputs(30, 31)
    out = attend(given["q"].detach(), given["k"].detach(), given["v"])
    (gradient,) = torch.autograd.grad(out.sum(), given["v"])
    assert gradient.shape == given["v"].shape


# broken on purpose


def _without_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = MODULE._weights
    monkeypatch.setattr(MODULE, "_weights", lambda q, k, mask: weights(q, k, None))


def _wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = MODULE._weights
    monkeypatch.setattr(MODULE, "_weights", lambda q, k, mask: weights(q, k, mask).softmax(-2))


def _index_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_read_by", lambda index, t: t if index is None else t[[0] * len(index)])


def _other_mask_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, keep = [], MODULE.keep_mask

    def draw(seed: Tensor, *rest: Any) -> Tensor:
        drawn.append(seed)
        return keep(seed + (len(drawn) - 1), *rest)

    monkeypatch.setattr(MODULE, "keep_mask", draw)


@pytest.mark.mutation
@pytest.mark.parametrize("mutate", [_without_mask, _wrong_axis, _index_ignored, _other_mask_in_backward])
def test_a_broken_attention_is_seen(mutate: Callable, monkeypatch: pytest.MonkeyPatch):
    more = {"key_mask": some_mask(3, 31), "kv_index": torch.tensor([0, 1, 1, 0]), "dropout_p": 0.3, "seed": 7}
    given = inputs(30, 31, rows=4, key_rows=3, **more)
    truth = checking.results(cross_attention_reference, checking.upcast(given))  # draws by its own name
    mutate(monkeypatch)
    found = checking.results(cross_attention, given)
    assert max(checking.errors(found, truth).values()) > 100 * TOLERANCE


# bad input

FITTING = {"q": torch.zeros(2, 2, 3, 8), "k": torch.zeros(2, 2, 4, 8), "v": torch.zeros(2, 2, 4, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 3)}, r"q \(2, 2, 3\)"),
        ({"v": torch.zeros(2, 2, 5, 8)}, r"v \(2, 2, 5, 8\)"),
        ({"q": torch.zeros(2, 4, 3, 8)}, r"q \(2, 4, 3, 8\), k \(2, 2, 4, 8\)"),
        ({"key_mask": torch.ones(2, 4)}, r"key_mask \(2, 4\) torch.float32 must be \(2, 4\) torch.bool"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask \(2, 3\) torch.bool must be \(2, 4\)"),
        ({"q": torch.zeros(3, 2, 3, 8)}, r"k has 2 rows for 3 of q; give kv_index \(3,\)"),
        ({"kv_index": torch.zeros(3, dtype=torch.long)}, r"kv_index \(3,\) torch.int64 must be \(2,\) torch.int64"),
        ({"kv_index": torch.zeros(2, dtype=torch.int32)}, r"kv_index \(2,\) torch.int32 must be \(2,\) torch.int64"),
        ({"kv_index": torch.tensor([0, 2])}, r"kv_index has values 0..2, k has rows 0..1"),
        ({"kv_index": torch.tensor([-1, 0])}, r"kv_index has values -1..0, k has rows 0..1"),
        ({"q": torch.zeros(2, 2, 3, 8, dtype=torch.int64)}, "q torch.int64, k torch.float32"),
        ({"v": torch.zeros(2, 2, 4, 8, dtype=torch.bfloat16)}, "v torch.bfloat16 must be one floating dtype"),
        ({"q": torch.zeros(2, 2, 3, 8, device="meta")}, "tensors are on cpu, meta"),
        ({name: torch.zeros(2, 2, 0, 8) for name in "kv"}, r"k \(2, 2, 0, 8\) has no keys"),
        ({"dropout_p": 1.0}, r"dropout_p=1.0 must be in \[0, 1\)"),
        ({"seed": torch.tensor([1.5])}, r"seed \(1,\) torch.float32 on cpu must be one int64 on the CPU"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_with_both(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attend(**{**FITTING, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 16)}, r"q \(4, 16\)"),
        ({"cu_q": torch.zeros(2, 2, dtype=torch.long)}, r"cu_q \(2, 2\) torch.int64 must be \(rows \+ 1,\)"),
        ({"cu_k": torch.zeros(3)}, r"cu_k \(3,\) torch.float32 must be \(rows \+ 1,\) int32 or int64"),
        ({"max_k": 0}, "max_q=3 and max_k=0 must be at least 1"),
        ({"cu_q": torch.tensor([0, 2, 3, 4])}, r"cu_k has 2 rows for 3 of cu_q; give kv_index \(3,\)"),
    ],
)
def test_packed_rows_that_do_not_fit_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        cross_attention_varlen(**{**packed([3, 1], [4, 2]), **change})
