"""cross_attention: softmax(q k^T / sqrt(D)) v over visible keys, where several query rows may share one key row.

Bq query rows, Bk key rows, H heads, M queries, N keys, D head size. Softmax statistics are fp32 whatever the inputs.
A row whose keys are all masked attends to all of them evenly (it never gives NaN).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LONG_ROW = 128
"""Rows from which SDPA's flash path beats matmul-softmax-matmul on a CPU in fp32 (measured at 257 x 257)."""


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, kv_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output (Bq, H, M, D) and the first query's attention (Bq, H, N), by the definition."""
    if kv_index is not None:
        k, v = k[kv_index], v[kv_index]
        key_mask = None if key_mask is None else key_mask[kv_index]
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return torch.einsum("bhmn,bhnd->bhmd", weights, v), weights[:, :, 0]


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    kv_index: Tensor | None = None,
    dropout_p: float = 0.0,
    return_cls_row: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the attention output, and on request the first query's undropped attention.

    Args:
        q: (Bq, H, M, D). k, v: (Bk, H, N, D).
        key_mask: (Bk, N) bool, True at visible keys; None: all are visible.
        kv_index: (Bq,) int64, the key row of each query row; None: row b reads key row b (Bq = Bk).
        dropout_p: chance of dropping an attention weight.
        return_cls_row: also return (Bq, H, N) fp32.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(q, k, v, key_mask, kv_index)
    if kv_index is not None:  # index_select: the backward of advanced indexing is not repeatable on a CPU
        k, v = k.index_select(0, kv_index), v.index_select(0, kv_index)
        key_mask = None if key_mask is None else key_mask.index_select(0, kv_index)
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if _sdpa_is_faster(q, k, dropout_p) and not return_cls_row:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)
        if visible is None:
            return out
        return torch.where(visible.any(-1, keepdim=True), out, v.mean(2, keepdim=True))  # SDPA gives 0 for no keys
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32)
    kept = F.dropout(weights, dropout_p) if dropout_p else weights
    out = kept.to(v.dtype) @ v
    return (out, weights[:, :, 0]) if return_cls_row else out


def _sdpa_is_faster(q: Tensor, k: Tensor, dropout_p: float) -> bool:
    if q.device.type != "cpu":
        return True
    return q.dtype == torch.float32 and not dropout_p and min(q.shape[2], k.shape[2]) >= LONG_ROW


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kv_index: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"cross_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be "
            "(Bq, H, M, D), (Bk, H, N, D), (Bk, H, N, D)"
        )
    if key_mask is not None and (key_mask.shape != (k.shape[0], k.shape[2]) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"cross_attention: key_mask {tuple(key_mask.shape)} {key_mask.dtype} must be "
            f"({k.shape[0]}, {k.shape[2]}) torch.bool"
        )
    rows = q.shape[0]
    if kv_index is None and k.shape[0] != rows:
        raise ValueError(f"cross_attention: k has {k.shape[0]} rows for {rows} of q; give kv_index ({rows},)")
    if kv_index is not None and kv_index.shape != (rows,):
        raise ValueError(f"cross_attention: kv_index {tuple(kv_index.shape)} must be ({rows},)")
