"""cross_attention's Triton kernels, by the interpreter: forward and every gradient against float64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from simla_kernels import checking, dispatch, self_check
from simla_kernels.dropout import philox_uniform

# one row; a caption, odd on purpose; more than two blocks of keys with one left over (257 takes the interpreter long)
QUERIES, KEYS = (1, 31, 65), (1, 30, 129)
GUARD = 777.0


@pytest.fixture(autouse=True)
def _by_triton():
    with dispatch.forced("triton"):
        yield


def assert_agrees(op: str, arguments: dict[str, Any], tolerance: float = 1e-5) -> None:
    operation = dispatch.OPERATIONS[op]
    assert dispatch.backend(op, **arguments).name == "triton"
    truth = checking.results(operation.reference, checking.upcast(arguments))
    for name, error in checking.errors(checking.results(operation.function, arguments), truth).items():
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def tokens(rows: int, length: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, 2, length, dim) as a linear layer leaves it, inside a buffer whose guards show if they are read."""
    buffer = torch.full((rows + 2, length + 2, 2, dim), GUARD, dtype=dtype)
    inner = buffer[1:-1, 1:-1]
    inner.copy_(torch.randn(inner.shape, generator=torch.Generator().manual_seed(seed)))
    return inner.transpose(1, 2).requires_grad_()


@pytest.mark.parametrize(("queries", "keys"), list(itertools.product(QUERIES, KEYS)))
def test_forward_and_gradients_at_odd_sizes(queries: int, keys: int):
    q, k, v = tokens(2, queries, 16, 0), tokens(2, keys, 16, 1), tokens(2, keys, 16, 2)
    assert_agrees("cross_attention", {"q": q, "k": k, "v": v, "dropout_p": 0.0, "seed": 0, "return_cls_row": True})


@pytest.mark.parametrize("dim", [16, 40, 64, 128])  # 40: not a power of two, so that a tile is wider than a head
def test_head_sizes(dim: int):
    q, k, v = tokens(1, 31, dim, 0), tokens(1, 33, dim, 1), tokens(1, 33, dim, 2)
    assert_agrees("cross_attention", {"q": q, "k": k, "v": v, "dropout_p": 0.0, "seed": 0})


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("index", [None, [2, 0, 2, 2, 0]])
def test_masks_shared_keys_and_dropout_together(index: list[int] | None, dropout_p: float):
    q, k, v = tokens(5 if index else 3, 31, 16, 0), tokens(3, 70, 16, 1), tokens(3, 70, 16, 2)
    mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, 1:], mask[2] = False, False  # all but [CLS] hidden; no key at all
    mask[0, 0] = True
    assert_agrees(
        "cross_attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "key_mask": mask,
            "kv_index": None if index is None else torch.tensor(index),
            "dropout_p": dropout_p,
            "seed": 2**40 + 7,
            "return_cls_row": True,
        },
    )


def test_keys_behind_the_mask_are_not_read():
    q, k, v = tokens(2, 5, 16, 0), tokens(2, 40, 16, 1), tokens(2, 40, 16, 2)
    mask = torch.arange(40).expand(2, 40) < 11
    poisoned = [t.detach().masked_fill(~mask[:, None, :, None], 1e6) for t in (k, v)]
    attend = dispatch.OPERATIONS["cross_attention"].function
    torch.testing.assert_close(attend(q, *poisoned, mask), attend(q, k, v, mask), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_twice_pytorchs(dtype: torch.dtype):
    arguments = {"q": tokens(2, 31, 16, 0, dtype), "k": tokens(2, 70, 16, 1, dtype), "v": tokens(2, 70, 16, 2, dtype)}
    operation = dispatch.OPERATIONS["cross_attention"]
    truth = checking.results(operation.reference, {**checking.upcast(arguments), "dropout_p": 0.0, "seed": 0})
    theirs = checking.errors(
        checking.results(torch.nn.functional.scaled_dot_product_attention, _as_sdpa(arguments)), _as_sdpa(truth)
    )
    mine = checking.errors(checking.results(operation.function, arguments), truth)
    for name, error in mine.items():
        assert error <= 2 * theirs[name.replace("grad.q", "grad.query").replace("grad.k", "grad.key")
                               .replace("grad.v", "grad.value")] + 1e-4  # fmt: skip


def _as_sdpa(arguments: dict[str, Any]) -> dict[str, Any]:
    names = {"q": "query", "k": "key", "v": "value", "grad.q": "grad.query", "grad.k": "grad.key"}
    names["grad.v"] = "grad.value"
    return {names.get(name, name): value for name, value in arguments.items()}


@pytest.mark.parametrize("op", ["cross_attention", "cross_attention_varlen"])
@pytest.mark.parametrize("size", range(self_check.SIZES))
def test_the_self_checks_examples_agree(op: str, size: int):
    assert_agrees(op, dispatch.OPERATIONS[op].example(size, torch.device("cpu"), torch.float32))


def test_packed_rows_with_dropout_are_the_dense_ones():
    lengths, starts = [3, 1, 5], torch.tensor([0, 3, 4, 9])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, 16, generator=generator) for _ in range(3))
    packed = dispatch.OPERATIONS["cross_attention_varlen"].function(q, k, v, starts, starts, 5, 5, None, 0.4, 11)
    keep = philox_uniform(11, torch.arange(3 * 2 * 5 * 5).view(3, 2, 5, 5)) >= 0.4
    dense = dispatch.OPERATIONS["cross_attention"].reference
    from simla_kernels import cross_attention_reference

    assert dense is not cross_attention_reference
    for row, length in enumerate(lengths):
        one = [t[starts[row] : starts[row + 1]].transpose(0, 1)[None] for t in (q, k, v)]
        mask = keep[row : row + 1, :, :length, :length]
        wanted = cross_attention_reference(*one, dropout_p=0.4, keep=mask)
        assert isinstance(wanted, Tensor)
        torch.testing.assert_close(packed[starts[row] : starts[row + 1]], wanted[0].transpose(0, 1), atol=2e-6, rtol=0)


def test_two_backward_passes_are_bit_identical():
    q, k, v = tokens(4, 31, 16, 0), tokens(2, 33, 16, 1), tokens(2, 33, 16, 2)
    arguments = {"q": q, "k": k, "v": v, "kv_index": torch.tensor([1, 0, 1, 1]), "dropout_p": 0.2, "seed": 3}
    function = dispatch.OPERATIONS["cross_attention"].function
    first, second = checking.results(function, arguments), checking.results(function, arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_written_beside_the_results(monkeypatch: pytest.MonkeyPatch):
    buffers = []

    def guarded(t: Tensor, packing: object) -> Tensor:
        rows, heads, length, dim = t.shape
        buffers.append(torch.full((rows, length + 2, heads, dim), GUARD))
        return buffers[-1][:, 1:-1].transpose(1, 2)

    monkeypatch.setattr("simla_kernels.cross_attention_triton._empty_like_tokens", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded(t, None) if t.dim() == 4 else t.new_empty(t.shape))
    q, k, v = tokens(2, 31, 24, 0), tokens(2, 33, 24, 1), tokens(2, 33, 24, 2)  # a tile is 32 wide
    assert_agrees("cross_attention", {"q": q, "k": k, "v": v, "dropout_p": 0.0, "seed": 0})
    assert len(buffers) >= 4
    for buffer in buffers:
        assert (buffer[:, [0, -1]] == GUARD).all()


def test_the_self_check_passes_here_and_names_what_is_off(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(self_check, "SIZES", 1)  # the larger ones are held against the definition above
    assert self_check.failure("cross_attention_varlen", cpu, (torch.float32,)) is None
    monkeypatch.setitem(self_check.TOLERANCES, torch.float32, 0.0)
    found = self_check.failure("cross_attention_varlen", cpu, (torch.float32,))
    assert found is not None
    assert "off by" in found


def test_philox_in_pytorch_is_tritons():
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out_ptr, seed, first):
        i = tl.arange(0, 64)
        tl.store(out_ptr + i, tl.rand(seed, first + i.to(tl.int64)))

    for seed, first in ((0, 0), (2**40 + 12345, 2**33 - 7), (2**31 - 1, 2**32 - 20)):
        out = torch.empty(64)
        draw[(1,)](out, seed, first)
        assert torch.equal(out, philox_uniform(seed, torch.arange(64) + first))
