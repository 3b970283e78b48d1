"""cross_attention_varlen: cross_attention over packed sequences, queries and keys each with lengths of their own.

T tokens of all rows one behind the other; row b's queries are cu_q[b] .. cu_q[b + 1]. A row without keys gives zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import dispatch
from simla_kernels.cross_attention import (
    _by_triton,
    _check_range,
    _is_flash,
    _no_row,
    _read_by,
    _refuses,
    _torch_backward,
    _torch_forward,
    check_index,
    check_kind,
    cross_attention_reference,
)
from simla_kernels.dropout import as_seed


def cross_attention_varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    kv_index: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_cls_row: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute row by row. Dropout is left out: its masks are defined by the implementations."""
    outs, cls_rows = [], []
    for row, (first, last) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
        key_row = row if kv_index is None else int(kv_index[row])
        keys = slice(int(cu_k[key_row]), int(cu_k[key_row + 1]))
        one = [t.transpose(0, 1)[None] for t in (q[first:last], k[keys], v[keys])]
        if last == first or keys.stop == keys.start:
            outs.append(q[first:last] * 0)
            cls_rows.append(q.new_zeros(q.shape[1], max_k))
            continue
        out, weights = cross_attention_reference(one[0], one[1], one[2], return_cls_row=True)
        outs.append(out[0].transpose(0, 1))
        cls_rows.append(F.pad(weights[0], (0, max_k - weights.shape[-1])))
    out = torch.cat(outs)
    return (out, torch.stack(cls_rows).detach()) if return_cls_row else out


# PyTorch's path: rows padded to the longest, inside the operation


def _is_full(total: int, cu: Tensor, longest: int) -> bool:
    """Whether all rows are equally long, pictures say: by host numbers, since none is longer than the longest."""
    return total == (cu.numel() - 1) * longest


def _pad(t: Tensor, cu: Tensor, longest: int) -> Tensor:
    """(total, H, D) packed tokens to (B, H, longest, D), zeros behind each row's end."""
    if _is_full(t.shape[0], cu, longest):
        return t.unflatten(0, (-1, longest)).transpose(1, 2)
    place = torch.arange(longest, device=t.device)
    inside = place < (cu[1:] - cu[:-1])[:, None]
    where = torch.where(inside, cu[:-1, None] + place, 0)
    rows = t.index_select(0, where.flatten()).view(*where.shape, *t.shape[1:])
    return (rows * inside[:, :, None, None]).transpose(1, 2)


def _unpad(t: Tensor, cu: Tensor, total: int) -> Tensor:
    """(B, H, longest, D) to the (total, H, D) tokens inside."""
    if _is_full(total, cu, t.shape[2]):
        return t.transpose(1, 2).flatten(0, 1)
    token = torch.arange(total, device=t.device)
    row = torch.searchsorted(cu[1:], token, right=True)
    return t.transpose(1, 2).flatten(0, 1).index_select(0, row * t.shape[2] + token - cu[row])


def _inside(cu: Tensor, longest: int) -> Tensor:
    return torch.arange(longest, device=cu.device) < (cu[1:] - cu[:-1])[:, None]


# Registration


@torch.library.custom_op("simla_kernels::cross_attention_varlen", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    index: Tensor | None, p: float, seed: Tensor, cls: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_range("cross_attention_varlen", index, cu_k.numel() - 1)
    if _by_triton("cross_attention_varlen", q, k, v):
        from simla_kernels import cross_attention_triton as kernels

        packing = kernels.Packing(cu_q.int(), cu_k.int(), max_q, max_k)
        return kernels.forward(q, k, v, None, index, p, int(seed), cls, packing)
    padded = (_pad(q, cu_q, max_q), _pad(k, cu_k, max_k), _pad(v, cu_k, max_k))
    inside = _inside(cu_k, max_k)
    mask = None if _is_full(k.shape[0], cu_k, max_k) else inside
    out, state, row = _torch_forward(*padded, mask, index, p, seed, cls)
    if cls:  # a row without keys or without a first query attends to nothing here, evenly to padding there
        row = row * _read_by(index, inside)[:, None] * _inside(cu_q, 1)[:, None]
    return _unpad(out, cu_q, q.shape[0]), state, row


@_forward.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, index, p, seed, cls):
    rows, heads = cu_q.numel() - 1, q.shape[1]
    state = _no_row(q)
    if _by_triton("cross_attention_varlen", q, k, v):
        state = q.new_empty((heads, q.shape[0]), dtype=torch.float32)
    elif _is_flash(q, max_q, max_k, p):
        state = q.new_empty((rows, heads, max_q), dtype=torch.float32)
    return q.new_empty(q.shape), state, q.new_empty((rows, heads, max_k) if cls else (0,), dtype=torch.float32)


@torch.library.custom_op("simla_kernels::cross_attention_varlen_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, index: Tensor | None, p: float, seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _by_triton("cross_attention_varlen", q, k, v):
        from simla_kernels import cross_attention_triton as kernels

        packing = kernels.Packing(cu_q.int(), cu_k.int(), max_q, max_k)
        assert out is not None  # kept where the log-sum-exp is
        return kernels.backward(dout, q, k, v, out, state, None, index, p, int(seed), packing)
    dout, asking = _pad(dout, cu_q, max_q), _pad(q, cu_q, max_q)
    out = None if out is None else _pad(out, cu_q, max_q)
    mask = None if _is_full(k.shape[0], cu_k, max_k) else _inside(cu_k, max_k)
    answering = _pad(k, cu_k, max_k), _pad(v, cu_k, max_k)
    dq, dk, dv = _torch_backward(dout, asking, *answering, out, state, mask, index, p, seed)
    return _unpad(dq, cu_q, q.shape[0]), _unpad(dk, cu_k, k.shape[0]), _unpad(dv, cu_k, k.shape[0])


@_backward.register_fake
def _(dout, q, k, v, out, state, cu_q, cu_k, max_q, max_k, index, p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, index, ctx.p, seed, _ = inputs
    out, state, row = output
    read = out if state.numel() else None  # by the fused paths only
    ctx.save_for_backward(q, k, v, read, state, cu_q, cu_k, index, seed)
    ctx.mark_non_differentiable(state, row)
    ctx.set_materialize_grads(False)


def _run_backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 11
    q, k, v, out, state, cu_q, cu_k, index, seed = ctx.saved_tensors
    gradients = _backward(dout, q, k, v, out, state, cu_q, cu_k, ctx.max_q, ctx.max_k, index, ctx.p, seed)
    return (*gradients, *(None,) * 8)


_forward.register_autograd(_run_backward, setup_context=_setup_context)


# Public


def cross_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    kv_index: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_cls_row: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the attention output of packed rows, and on request each row's first query's undropped attention.

    Args:
        q: (T_q, H, D). k, v: (T_k, H, D). fp32, bf16 or fp16, all alike.
        cu_q: (Bq + 1,) int64 or int32, where each query row starts; the last is T_q. cu_k: (Bk + 1,) for the keys.
        max_q, max_k: the longest query row and key row, or more (host numbers: reading them would wait for the device).
        kv_index, dropout_p, seed: as in cross_attention.
        return_cls_row: also return (Bq, H, max_k) fp32, zero behind a row's keys.

    Returns:
        (T_q, H, D) in q's dtype.

    Raises:
        ValueError: as cross_attention.
    """
    _check(q, k, v, cu_q, cu_k, max_q, max_k, kv_index)
    p = float(dropout_p)
    seed = as_seed("cross_attention_varlen", seed, p)
    out, _, row = _forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_index, p, seed, return_cls_row)
    return (out, row) if return_cls_row else out


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, kv_index: Tensor | None
) -> None:
    op = "cross_attention_varlen"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or not len(q) or not len(k):
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (T_q, H, D), (T_k, H, D), "
            "(T_k, H, D) with at least one token each"
        )
    check_kind(op, q, k, v, cu_q, cu_k, kv_index)
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if cu.dim() != 1 or cu.numel() < 2 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: {name} {tuple(cu.shape)} {cu.dtype} must be (rows + 1,) int32 or int64")
    if min(max_q, max_k) < 1:
        raise ValueError(f"{op}: max_q={max_q} and max_k={max_k} must be at least 1")
    rows, key_rows = cu_q.numel() - 1, cu_k.numel() - 1
    if kv_index is None and rows != key_rows:
        raise ValueError(f"{op}: cu_k has {key_rows} rows for {rows} of cu_q; give kv_index ({rows},)")
    check_index(op, kv_index, rows)


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Captions of several lengths, over pictures that several share, one without keys, one without queries."""
    lengths, key_lengths, index = (
        ([1, 3], [5, 2], None),
        ([30, 9, 17], [257, 257], [1, 0, 1]),
        ([12, 1, 40, 0], [7, 0, 33], [2, 1, 0, 0]),
    )[size]
    generator, dim = torch.Generator().manual_seed(size), (32, 64, 88)[size]

    def normal(counts: list[int]) -> Tensor:
        return torch.randn(sum(counts), 2, dim, generator=generator).to(device, dtype).requires_grad_()

    def starts(counts: list[int]) -> Tensor:
        return F.pad(torch.tensor(counts).cumsum(0), (1, 0)).to(device)

    return {
        "q": normal(lengths),
        "k": normal(key_lengths),
        "v": normal(key_lengths),
        "cu_q": starts(lengths),
        "cu_k": starts(key_lengths),
        "max_q": max(lengths),
        "max_k": max(key_lengths),
        "kv_index": None if index is None else torch.tensor(index, device=device),
        "return_cls_row": True,
    }


dispatch.register(dispatch.Operation(cross_attention_varlen, cross_attention_varlen_reference, _example, _refuses))
