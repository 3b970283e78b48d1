"""Triton kernels of cross_attention: dense and packed sequences by the same code.

Scores are kept in units of log2, so that exp2 serves. A program owns a block of queries (forward, dq) or of keys (dk,
dv, in the order of the query rows that share them: sums are repeatable). Key codes: 0 masked, 1 visible, 2 a key of a
row without any visible one, which attends evenly. Layouts come as strides; packed sequences have row stride 0
and a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simla_kernels.configs import config
from simla_kernels.launching import dot_precision, interpreting, launch, next_power_of_2

LOG2_E = 1.4426950408889634
SHORT = 32
"""Queries or keys up to which the small tiles serve: a caption."""


class Packing(NamedTuple):
    """Where packed sequences start: (rows + 1,) int32 offsets, and the longest sequence."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@triton.jit
def _tile(ptr, rows, row_stride, row_count, D: tl.constexpr, d_stride, BLOCK_D: tl.constexpr):
    """Load rows x BLOCK_D; zeros beyond row_count and D."""
    d = tl.arange(0, BLOCK_D)
    inside = rows[:, None] < row_count
    if D != BLOCK_D:
        inside = inside & (d[None, :] < D)
    return tl.load(ptr + rows[:, None] * row_stride + d[None, :] * d_stride, mask=inside, other=0.0)


@triton.jit
def _store_tile(ptr, value, rows, row_stride, row_count, D: tl.constexpr, d_stride, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = rows[:, None] < row_count
    if D != BLOCK_D:
        inside = inside & (d[None, :] < D)
    tl.store(ptr + rows[:, None] * row_stride + d[None, :] * d_stride, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _visible_scores(s, n, n_count, code_ptr, code_start, HAS_MASK: tl.constexpr):
    """Mask scores whose last axis is keys n: masked keys weigh nothing, a dead row's weigh alike, others stay."""
    if HAS_MASK:
        code = tl.load(code_ptr + code_start + n, mask=n < n_count, other=0)[None, :]
        s = tl.where(code == 1, s, tl.where(code == 2, 0.0, -1.0e30))
    return tl.where(n[None, :] < n_count, s, float("-inf"))


@triton.jit
def _keep_scale(seed, dropout_p, row, m, n, M, N):
    """Return 1 / (1 - p) at kept weights and 0 at dropped ones; m and n broadcast."""
    offset = (row.to(tl.int64) * M + m) * N + n
    return tl.where(tl.rand(seed, offset) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def _span(cu_ptr, row, length, PACKED: tl.constexpr):
    """Return where a sequence starts in the packed axis, and how long it is."""
    start = 0
    if PACKED:
        first = tl.load(cu_ptr + row)
        length = tl.load(cu_ptr + row + 1) - first
        start = first.to(tl.int64)  # tokens before it x width may be more than 2^31
    return start, length


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(
    q_ptr,  # in   (Bq, H, M, D)
    k_ptr,  # in   (Bk, H, N, D)
    v_ptr,  # in   (Bk, H, N, D)
    code_ptr,  # in   (Bk, N) int8, see above
    index_ptr,  # in   (Bq,) key row of a query row
    cu_q_ptr,  # in   (Bq + 1,) starts of packed queries
    cu_k_ptr,  # in   (Bk + 1,) starts of packed keys
    out_ptr,  # out  (Bq, H, M, D)
    lse_ptr,  # out  (Bq, H, M) fp32, log2 of the sum of exponentials
    seed, dropout_p, scale, H, M, N,
    q_row, q_head, q_token, q_dim, k_row, k_head, k_token, k_dim, v_row, v_head, v_token, v_dim,
    o_row, o_head, o_token, o_dim, l_row, l_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(q k^T scale)) v for BLOCK_M queries of one row and head."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    bk = tl.load(index_ptr + b) if SHARED else b
    q_start, q_count = _span(cu_q_ptr, b, M, PACKED)
    k_start, k_count = _span(cu_k_ptr, bk, N, PACKED)
    if tl.program_id(1) * BLOCK_M >= q_count:
        return
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b64, bk64 = b.to(tl.int64), bk.to(tl.int64)
    k_ptr += bk64 * k_row + k_start * k_token + h * k_head
    v_ptr += bk64 * v_row + k_start * v_token + h * v_head
    q = _tile(q_ptr + b64 * q_row + q_start * q_token + h * q_head, m, q_token, q_count, D, q_dim, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n_first in range(0, k_count, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr, n, k_token, k_count, D, k_dim, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = _visible_scores(s, n, k_count, code_ptr, bk64 * N, HAS_MASK)
        new_highest = tl.maximum(highest, tl.max(s, 1))
        p = tl.math.exp2(s - new_highest[:, None])
        correction = tl.math.exp2(highest - new_highest)
        total = total * correction + tl.sum(p, 1)
        if DROPOUT:
            p *= _keep_scale(seed, dropout_p, tl.program_id(0), m[:, None], n[None, :], M, N)
        v = _tile(v_ptr, n, v_token, k_count, D, v_dim, BLOCK_D)
        acc = acc * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        highest = new_highest
    none = total == 0.0  # a packed sequence without keys: its queries get zeros
    acc = acc / tl.where(none, 1.0, total)[:, None]
    o_ptr = out_ptr + b64 * o_row + q_start * o_token + h * o_head
    _store_tile(o_ptr, acc, m, o_token, q_count, D, o_dim, BLOCK_D)
    lse = tl.where(none, 0.0, highest + tl.math.log2(tl.where(none, 1.0, total)))
    tl.store(lse_ptr + b64 * l_row + h * l_head + q_start + m, lse, mask=m < q_count)


@triton.jit(do_not_specialize=["seed"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, code_ptr, index_ptr, cu_q_ptr, cu_k_ptr,  # in   as forward_kernel
    out_ptr,  # in   (Bq, H, M, D)
    dout_ptr,  # in   (Bq, H, M, D)
    lse_ptr,  # in   (Bq, H, M)
    delta_ptr,  # out  (Bq, H, M) fp32, <dout, out>
    dq_ptr,  # out  (Bq, H, M, D)
    seed, dropout_p, scale, H, M, N,
    q_row, q_head, q_token, q_dim, k_row, k_head, k_token, k_dim, v_row, v_head, v_token, v_dim,
    o_row, o_head, o_token, o_dim, do_row, do_head, do_token, do_dim, l_row, l_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one row and head; dq has out's strides."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    bk = tl.load(index_ptr + b) if SHARED else b
    q_start, q_count = _span(cu_q_ptr, b, M, PACKED)
    k_start, k_count = _span(cu_k_ptr, bk, N, PACKED)
    if tl.program_id(1) * BLOCK_M >= q_count:
        return
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b64, bk64 = b.to(tl.int64), bk.to(tl.int64)
    k_ptr += bk64 * k_row + k_start * k_token + h * k_head
    v_ptr += bk64 * v_row + k_start * v_token + h * v_head
    q = _tile(q_ptr + b64 * q_row + q_start * q_token + h * q_head, m, q_token, q_count, D, q_dim, BLOCK_D)
    o_offset = b64 * o_row + q_start * o_token + h * o_head
    out = _tile(out_ptr + o_offset, m, o_token, q_count, D, o_dim, BLOCK_D)
    do_offset = b64 * do_row + q_start * do_token + h * do_head
    dout = _tile(dout_ptr + do_offset, m, do_token, q_count, D, do_dim, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    statistics = b64 * l_row + h * l_head + q_start + m
    tl.store(delta_ptr + statistics, delta, mask=m < q_count)
    lse = tl.load(lse_ptr + statistics, mask=m < q_count, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n_first in range(0, k_count, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr, n, k_token, k_count, D, k_dim, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = _visible_scores(s, n, k_count, code_ptr, bk64 * N, HAS_MASK)
        p = tl.math.exp2(s - lse[:, None])
        v = _tile(v_ptr, n, v_token, k_count, D, v_dim, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = dp * _keep_scale(seed, dropout_p, tl.program_id(0), m[:, None], n[None, :], M, N)
        ds = p * (dp - delta[:, None])  # pyright: ignore[reportArgumentType]  it takes tl.sum's result for a constexpr
        if HAS_MASK:  # a dead row's weights do not depend on its scores
            code = tl.load(code_ptr + bk64 * N + n, mask=n < k_count, other=0)
            ds = tl.where(code[None, :] == 1, ds, 0.0)
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    acc *= scale * 0.6931471805599453  # the scores' scale is in log2 units
    _store_tile(dq_ptr + o_offset, acc, m, o_token, q_count, D, o_dim, BLOCK_D)


@triton.jit(do_not_specialize=["seed"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, code_ptr,  # in   as forward_kernel
    sharer_ptr,  # in   (Bq,) query rows in the order of their key rows
    first_sharer_ptr,  # in   (Bk + 1,) where a key row's sharers start
    cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, delta_ptr,  # in   as dq_kernel
    dk_ptr,  # out  (Bk, H, N, D)
    dv_ptr,  # out  (Bk, H, N, D)
    seed, dropout_p, scale, H, M, N,
    q_row, q_head, q_token, q_dim, k_row, k_head, k_token, k_dim, v_row, v_head, v_token, v_dim,
    dk_row, dk_head, dk_token, dk_dim, do_row, do_head, do_token, do_dim, l_row, l_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key row and head, summed over the query rows that share it, in their order.

    Scores are transposed, keys x queries, so that no tile is. dk and dv have the same strides.
    """
    bk, h = tl.program_id(0) // H, tl.program_id(0) % H
    k_start, k_count = _span(cu_k_ptr, bk, N, PACKED)
    if tl.program_id(1) * BLOCK_N >= k_count:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    bk64 = bk.to(tl.int64)
    k = _tile(k_ptr + bk64 * k_row + k_start * k_token + h * k_head, n, k_token, k_count, D, k_dim, BLOCK_D)
    v = _tile(v_ptr + bk64 * v_row + k_start * v_token + h * v_head, n, v_token, k_count, D, v_dim, BLOCK_D)
    code = n[:, None]  # not read without a mask
    if HAS_MASK:
        code = tl.load(code_ptr + bk64 * N + n, mask=n < k_count, other=0)[:, None]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lo, hi = bk, bk + 1
    if SHARED:
        lo, hi = tl.load(first_sharer_ptr + bk), tl.load(first_sharer_ptr + bk + 1)
    for j in range(lo, hi):
        b = tl.load(sharer_ptr + j) if SHARED else j
        b64 = tl.cast(b, tl.int64)
        q_start, q_count = _span(cu_q_ptr, b, M, PACKED)
        q_at = q_ptr + b64 * q_row + q_start * q_token + h * q_head
        do_at = dout_ptr + b64 * do_row + q_start * do_token + h * do_head
        statistics = b64 * l_row + h * l_head + q_start
        for m_first in range(0, q_count, BLOCK_M):
            m = m_first + tl.arange(0, BLOCK_M)
            q = _tile(q_at, m, q_token, q_count, D, q_dim, BLOCK_D)
            dout = _tile(do_at, m, do_token, q_count, D, do_dim, BLOCK_D)
            lse = tl.load(lse_ptr + statistics + m, mask=m < q_count, other=float("inf"))  # weight 0 beyond the end
            delta = tl.load(delta_ptr + statistics + m, mask=m < q_count, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if HAS_MASK:
                s = tl.where(code == 1, s, tl.where(code == 2, 0.0, -1.0e30))
            p = tl.math.exp2(s - lse[None, :])
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept = p
            if DROPOUT:
                keep = _keep_scale(seed, dropout_p, b * H + h, m[None, :], n[:, None], M, N)
                kept, dp = p * keep, dp * keep
            dv += tl.dot(kept.to(dout.dtype), dout, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            if HAS_MASK:
                ds = tl.where(code == 1, ds, 0.0)
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    dk *= scale * 0.6931471805599453
    at = bk64 * dk_row + k_start * dk_token + h * dk_head
    _store_tile(dk_ptr + at, dk, n, dk_token, k_count, D, dk_dim, BLOCK_D)
    _store_tile(dv_ptr + at, dv, n, dk_token, k_count, D, dk_dim, BLOCK_D)


@triton.jit
def cls_row_kernel(
    q_ptr, k_ptr, code_ptr, index_ptr, cu_q_ptr, cu_k_ptr, lse_ptr,  # in   as forward_kernel
    row_ptr,  # out  (Bq, H, N) fp32
    scale, H, M, N, q_row, q_head, q_token, q_dim, k_row, k_head, k_token, k_dim, l_row, l_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first query's attention over BLOCK_N keys, from its log-sum-exp; zero beyond a packed sequence's end."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    bk = tl.load(index_ptr + b) if SHARED else b
    q_start, q_count = _span(cu_q_ptr, b, M, PACKED)
    k_start, k_count = _span(cu_k_ptr, bk, N, PACKED)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    b64, bk64 = b.to(tl.int64), bk.to(tl.int64)
    q = tl.load(
        q_ptr + b64 * q_row + q_start * q_token + h * q_head + d * q_dim, mask=(d < D) & (q_count > 0), other=0.0
    )
    k = _tile(k_ptr + bk64 * k_row + k_start * k_token + h * k_head, n, k_token, k_count, D, k_dim, BLOCK_D)
    s = tl.sum(k.to(tl.float32) * q.to(tl.float32)[None, :], 1) * scale
    s = _visible_scores(s[None, :], n, k_count, code_ptr, bk64 * N, HAS_MASK)
    lse = tl.load(lse_ptr + b64 * l_row + h * l_head + q_start, mask=q_count > 0, other=float("inf"))  # no query: zeros
    tl.store(row_ptr + (b64 * H + h) * N + n[None, :], tl.math.exp2(s - lse), mask=n[None, :] < N)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Tensor | None,
    kv_index: Tensor | None,
    dropout_p: float,
    seed: int,
    cls_row: bool,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log2-sum-exp and the first query's attention (empty unless asked for).

    Dense: q (Bq, H, M, D), k, v (Bk, H, N, D), codes (Bk, N) int8. Packed: q (total, H, D) and so on, and a Packing.
    """
    dtype = q.dtype
    q, k, v = (_for_interpreter(t) for t in (q, k, v))
    call = _Call(q, k, kv_index, codes, dropout_p, packing)
    out = _empty_like_tokens(q, packing)
    lse = q.new_empty(_statistics_shape(q, packing), dtype=torch.float32)
    settings = config("cross_attention.forward", call.size_class(call.M), q.device)
    launch(
        forward_kernel, (call.rows * call.H, triton.cdiv(call.M, settings.tiles["BLOCK_M"])), settings,
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, seed=seed, dropout_p=dropout_p,
        **call.inputs(), **call.strides(q=q, k=k, v=v, o=out), **call.statistics(lse), **call.switches(),
    )  # fmt: skip
    row = q.new_empty((call.rows, call.H, call.N) if cls_row else (0,), dtype=torch.float32)
    if cls_row:
        switches = {key: value for key, value in call.switches().items() if key not in ("DROPOUT", "PRECISION")}
        settings = config("cross_attention.cls_row", "any", q.device)
        launch(
            cls_row_kernel, (call.rows * call.H, triton.cdiv(call.N, settings.tiles["BLOCK_N"])), settings,
            q_ptr=q, k_ptr=k, lse_ptr=lse, row_ptr=row, **call.inputs(), **call.strides(q=q, k=k),
            **call.statistics(lse), **switches,
        )  # fmt: skip
    return out.to(dtype), lse, row


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    codes: Tensor | None,
    kv_index: Tensor | None,
    dropout_p: float,
    seed: int,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in their shapes."""
    dtype = q.dtype
    dout, q, k, v, out = (_for_interpreter(t) for t in (dout, q, k, v, out))
    call = _Call(q, k, kv_index, codes, dropout_p, packing)
    dq, delta = torch.empty_like(out), torch.empty_like(lse)
    common = {"seed": seed, "dropout_p": dropout_p, "q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout}
    common |= {"lse_ptr": lse, "delta_ptr": delta, **call.inputs(), **call.statistics(lse), **call.switches()}
    common |= call.strides(q=q, k=k, v=v, do=dout)
    settings = config("cross_attention.dq", call.size_class(call.M), q.device)
    launch(
        dq_kernel, (call.rows * call.H, triton.cdiv(call.M, settings.tiles["BLOCK_M"])), settings,
        out_ptr=out, dq_ptr=dq, **call.strides(o=out), **common,
    )  # fmt: skip
    dk, dv = (_empty_like_tokens(t, packing) for t in (k, v))
    del common["index_ptr"]
    settings = config("cross_attention.dkdv", call.size_class(call.N), q.device)
    launch(
        dkdv_kernel, (call.key_rows * call.H, triton.cdiv(call.N, settings.tiles["BLOCK_N"])), settings,
        dk_ptr=dk, dv_ptr=dv, **call.sharers(), **call.strides(dk=dk), **common,
    )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


class _Call:
    """What the launches of one call have in common."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        index: Tensor | None,
        codes: Tensor | None,
        dropout_p: float,
        packing: Packing | None,
    ):
        self.packing, self.index, self.codes, self.dropout = packing, index, codes, dropout_p > 0
        self.H, self.D, self.dtype, self.device = q.shape[1], q.shape[-1], q.dtype, q.device
        if packing is None:
            (self.rows, self.M), (self.key_rows, self.N) = (q.shape[0], q.shape[2]), (k.shape[0], k.shape[2])
        else:
            self.rows, self.key_rows = packing.cu_q.numel() - 1, packing.cu_k.numel() - 1
            self.M, self.N = packing.max_q, packing.max_k

    def inputs(self) -> dict[str, Any]:
        packing = self.packing
        return {
            "code_ptr": self.codes,
            "index_ptr": self.index,
            "cu_q_ptr": packing.cu_q if packing else None,
            "cu_k_ptr": packing.cu_k if packing else None,
            "scale": self.D**-0.5 * LOG2_E,
            "H": self.H,
            "M": self.M,
            "N": self.N,
        }

    def sharers(self) -> dict[str, Any]:
        if self.index is None:
            return {"sharer_ptr": None, "first_sharer_ptr": None}
        in_order, rows = torch.sort(self.index, stable=True)
        bounds = torch.arange(self.key_rows + 1, device=self.device, dtype=in_order.dtype)
        return {"sharer_ptr": rows, "first_sharer_ptr": torch.searchsorted(in_order, bounds)}

    def switches(self) -> dict[str, Any]:
        return {
            "D": self.D,
            "BLOCK_D": max(16, next_power_of_2(self.D)),
            "PACKED": self.packing is not None,
            "SHARED": self.index is not None,
            "HAS_MASK": self.codes is not None,
            "DROPOUT": self.dropout,
            "PRECISION": dot_precision(self.dtype, self.device),
        }

    def strides(self, **tensors: Tensor) -> dict[str, int]:
        """Return NAME_row, NAME_head, NAME_token, NAME_dim of each tensor."""
        found = {}
        for name, t in tensors.items():
            row, head, token, dim = t.stride() if self.packing is None else (0, t.stride(1), t.stride(0), t.stride(2))
            found |= {f"{name}_row": row, f"{name}_head": head, f"{name}_token": token, f"{name}_dim": dim}
        return found

    def statistics(self, lse: Tensor) -> dict[str, int]:
        row, head = (lse.stride(0), lse.stride(1)) if self.packing is None else (0, lse.stride(0))
        return {"l_row": row, "l_head": head}

    def size_class(self, length: int) -> str:
        wide = "d64" if self.D <= 64 else "d128"
        return f"{'fp32' if self.dtype == torch.float32 else 'half'} {wide} {'short' if length <= SHORT else 'long'}"


def _empty_like_tokens(t: Tensor, packing: Packing | None) -> Tensor:
    """Return an empty tensor of t's shape, token by token in memory: (B, M, H, D), what the next linear layer reads."""
    if packing is not None:
        return t.new_empty(t.shape)
    rows, heads, tokens, dim = t.shape
    return t.new_empty((rows, tokens, heads, dim)).transpose(1, 2)


def _statistics_shape(q: Tensor, packing: Packing | None) -> tuple[int, ...]:
    return tuple(q.shape[:3]) if packing is None else (q.shape[1], q.shape[0])


def _for_interpreter(t: Tensor) -> Tensor:
    """The interpreter rounds half-precision arithmetic wrongly: give it fp32."""
    return t.float() if interpreting() else t


def compile_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the step's attention calls on meta tensors, for ahead-of-time compilation.

    The last ones have every switch on that a call can have, which takes most registers.
    """
    shapes = {"text": (30, 30), "text over image": (30, 257), "image over text": (257, 30), "image": (257, 257)}
    for name, lengths in shapes.items():
        yield f"{name}, no switch", _case(dtype, lengths, 64)
        yield f"packed {name}", _case(dtype, lengths, 64, dropout_p=0.1, shared=True, packed=True)
        for dim in (128, 64):
            yield f"{name}, D {dim}", _case(dtype, lengths, dim, dropout_p=0.1, shared=True, masked=True)


def _case(
    dtype: torch.dtype,
    lengths: tuple[int, int],
    dim: int,
    *,
    dropout_p: float = 0.0,
    shared: bool = False,
    masked: bool = False,
    packed: bool = False,
) -> Callable[[], object]:
    queries, keys = lengths
    key_rows, rows = 64, 256 if shared else 64

    def tokens(count: int, length: int) -> Tensor:  # as a linear layer leaves them
        t = torch.empty(count, length, 12, dim, dtype=dtype, device="meta")
        return t.flatten(0, 1) if packed else t.transpose(1, 2)

    def run() -> None:
        q, k, v = tokens(rows, queries), tokens(key_rows, keys), tokens(key_rows, keys)
        codes = torch.empty(key_rows, keys, dtype=torch.int8, device="meta") if masked else None
        index = torch.empty(rows, dtype=torch.int64, device="meta") if shared else None
        cu_q, cu_k = (torch.empty(count + 1, dtype=torch.int32, device="meta") for count in (rows, key_rows))
        packing = Packing(cu_q, cu_k, queries, keys) if packed else None
        out, lse, _ = forward(q, k, v, codes, index, dropout_p, 3, True, packing)
        backward(out, q, k, v, out, lse, codes, index, dropout_p, 3, packing)

    return run
