"""cross_attention: softmax(q k^T / sqrt(D)) v over visible keys, where several query rows may share one key row.

Bq query rows, Bk key rows, H heads, M queries, N keys, D head size.
Softmax statistics are fp32 whatever the inputs. A row whose keys are all masked attends to all of them evenly, by
weights that do not depend on its scores (never NaN). After FlashAttention-2 (arXiv 2307.08691); shared keys, the [CLS]
row and the CPU path are this project's.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import dispatch, half
from simla_kernels.dropout import as_seed, keep_mask, philox_uniform

aten = torch.ops.aten
LONG_ROW = 128
"""Keys, or queries, from which SDPA's flash path beats matmul-softmax-matmul on a CPU in fp32 (measured at 257)."""
SHORT_ROW = 64
"""Keys below which bf16's softmax is taken in fp32 on a CPU: PyTorch's own needs twice the time for 25 of them."""
HEAD_SIZES = range(16, 129)
"""Of Triton's kernels."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    kv_index: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_cls_row: bool = False,
    *,
    keep: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute by the definition; `keep` (Bq, H, M, N) bool is the dropout mask, which PyTorch's path draws by seed."""
    if kv_index is not None:
        k, v = k[kv_index], v[kv_index]
        key_mask = None if key_mask is None else key_mask[kv_index]
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    kept = weights
    if dropout_p:
        if keep is None:
            keep = keep_mask(as_seed("cross_attention", seed, dropout_p), weights, dropout_p)
        kept = weights * keep / (1 - dropout_p)
    out = torch.einsum("bhmn,bhnd->bhmd", kept, v)
    return (out, weights[:, :, 0].detach()) if return_cls_row else out


# PyTorch's path


def _is_flash(q: Tensor, queries: int, keys: int, dropout_p: float) -> bool:
    """Whether SDPA's flash path runs on rows of so many queries and keys: it makes the weights again in backward.

    It wins with many queries, and over many keys unless the CPU has AVX512. With few of both it gains nothing, and its
    approximate exponential shows in gradients that nearly cancel.
    """
    if q.device.type != "cpu" or half.operand_dtype(q) != torch.float32 or dropout_p or max(queries, keys) < LONG_ROW:
        return False
    return queries >= LONG_ROW or torch.backends.cpu.get_cpu_capability() != "AVX512"


def _by_autograd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, dropout_p: float, cls: bool
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Return cross_attention's result by PyTorch's own nodes where these serve as well as the custom op, else None.

    On a CPU they cost less: they keep the copies of k and v that a product makes. Dropout, half precision (shared keys
    are summed in fp32), masked flash and compiled code are the custom op's.
    """
    is_flash = _is_flash(q, q.shape[2], k.shape[2], dropout_p)
    if (
        q.device.type != "cpu"
        or q.dtype not in (torch.float32, torch.float64)
        or dropout_p
        or (is_flash and (mask is not None or cls))
        or torch.compiler.is_compiling()
        or _by_triton("cross_attention", q, k, v)
    ):
        return None
    _check_range("cross_attention", index, k.shape[0])
    k, v, mask = _read_by(index, k), _read_by(index, v), None if mask is None else _read_by(index, mask)
    if is_flash:
        return F.scaled_dot_product_attention(q, k, v)
    weights = _weights(q, k, mask)
    return (weights @ v, weights[:, :, 0].detach().float()) if cls else weights @ v


def _for_flash(q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the queries and what flash adds to the scores (B, H, M, N).

    Queries of a row without visible keys are zero: then all its scores are, and its log-sum-exp is right.
    """
    if mask is None:
        return q, None
    dead = ~mask.any(-1)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask & ~dead[:, None], torch.finfo(q.dtype).min)
    bias = bias[:, None, None].expand(*q.shape[:3], mask.shape[1])
    return q.masked_fill(dead[:, None, None, None], 0.0), bias


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, p: float, seed: Tensor, cls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, what backward needs (log-sum-exp where flash runs, else nothing) and the [CLS] row."""
    with half.without_autocast(q.device):
        return _attend(q, k, v, mask, index, p, seed, cls)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, p: float, seed: Tensor, cls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if (wide := half.operand_dtype(q)) != q.dtype:
        out, state, row = _attend(q.to(wide), k.to(wide), v.to(wide), mask, index, p, seed, cls)
        return out.to(q.dtype), state, row
    k, v, mask = _read_by(index, k), _read_by(index, v), None if mask is None else _read_by(index, mask)
    row = _weights(q[:, :, :1].float(), k.float(), mask)[:, :, 0] if cls else _no_row(q)
    if _is_flash(q, q.shape[2], k.shape[2], p):
        q, bias = _for_flash(q, mask)
        out, state = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
        return _by_token(out), state.contiguous(), row
    weights = _weights(q, k, mask).to(q.dtype)
    if not p:
        return weights @ v, _no_row(q), row
    return ((weights * keep_mask(seed, weights, p)) @ v).div_(1 - p), _no_row(q), row


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor,
    mask: Tensor | None, index: Tensor | None, p: float, seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if (wide := half.operand_dtype(q)) != q.dtype:
        dout, out = dout.to(wide), None if out is None else out.to(wide)
        made = _torch_backward(dout, q.to(wide), k.to(wide), v.to(wide), out, state, mask, index, p, seed)
        dq, dk, dv = (gradient.to(q.dtype) for gradient in made)
        return dq, dk, dv
    key_rows = k.shape[0]
    k, v, mask = _read_by(index, k), _read_by(index, v), None if mask is None else _read_by(index, mask)
    is_flash = _is_flash(q, q.shape[2], k.shape[2], p)
    if is_flash:
        asking, bias = _for_flash(q, mask)
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash(dout, asking, k, v, out, state, 0.0, False, attn_mask=bias)
        if mask is not None:
            dq = dq.masked_fill_(~mask.any(-1)[:, None, None, None], 0.0)
    else:
        scale = q.shape[-1] ** -0.5
        dout = dout / (1 - p) if p else dout.contiguous()  # read twice: copied for each product otherwise
        weights = _weights(q, k, mask)  # again: kept from forward they would outweigh everything else
        dweights, kept = dout @ v.transpose(-1, -2), weights.to(q.dtype)
        if p:
            keep = keep_mask(seed, kept, p)
            kept, dweights = kept * keep, dweights.mul_(keep)
        dv = kept.transpose(-1, -2) @ dout
        exact = weights.dtype
        dscores = aten._softmax_backward_data(dweights.to(exact), weights, -1, exact).to(q.dtype)
        if mask is not None:  # a row without visible keys: its weights do not depend on its scores
            dscores.masked_fill_(~mask.any(-1)[:, None, None, None], 0.0)
        dq = (dscores @ k).mul_(scale)
        dk = dscores.transpose(-1, -2) @ (q * scale)
    dk, dv = _sum_sharers(dk, index, key_rows), _sum_sharers(dv, index, key_rows)
    return (_by_token(dq), _by_token(dk), _by_token(dv)) if is_flash else (dq, dk, dv)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax, in fp32 for short rows of bf16."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores.masked_fill_(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    short = half.on_units(scores) and scores.shape[-1] < SHORT_ROW
    return scores.softmax(-1, dtype=torch.float32 if short else None)  # sums are fp32 either way


def _read_by(index: Tensor | None, t: Tensor) -> Tensor:
    return t if index is None else t.index_select(0, index)


def _sum_sharers(gradient: Tensor, index: Tensor | None, key_rows: int) -> Tensor:
    """Add up what the rows that read a key row give back, in fp32 and in their order."""
    if index is None:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.device.type == "cpu":
        total = torch.zeros(key_rows, *gradient.shape[1:], dtype=wide)
        return total.index_add_(0, index, gradient.to(wide)).to(gradient.dtype)
    # index_add_ is atomic on a card, in any order
    reads = (index[None] == torch.arange(key_rows, device=index.device)[:, None]).to(wide)
    return (reads @ gradient.flatten(1).to(wide)).view(key_rows, *gradient.shape[1:]).to(gradient.dtype)


def _by_token(t: Tensor) -> Tensor:
    """Lay (B, H, M, D) out token by token, as the linear layer behind it reads it."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _no_row(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


# Registration


def _refuses(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> str | None:
    if q.shape[-1] not in HEAD_SIZES:
        return f"head size {q.shape[-1]} is outside {HEAD_SIZES.start}..{HEAD_SIZES.stop - 1}"
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not one of fp32, bf16, fp16"
    return None


def _by_triton(op: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    return dispatch.choose(op, q, lambda: _refuses(q, k, v)).name == "triton"


def _codes(mask: Tensor | None) -> Tensor | None:
    """0 masked, 1 visible, 2 every key of a row without visible ones; (Bk, N) int8."""
    if mask is None:
        return None
    return torch.where(mask.any(-1, keepdim=True), mask.to(torch.int8), 2).to(torch.int8)


@torch.library.custom_op("simla_kernels::cross_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Tensor | None, p: float, seed: Tensor, cls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_range("cross_attention", index, k.shape[0])
    if _by_triton("cross_attention", q, k, v):
        from simla_kernels import cross_attention_triton as kernels

        return kernels.forward(q, k, v, _codes(mask), index, p, int(seed), cls)
    return _torch_forward(q, k, v, mask, index, p, seed, cls)


@_forward.register_fake
def _(q, k, v, mask, index, p, seed, cls):
    rows, heads, queries, _ = q.shape
    row = q.new_empty((rows, heads, k.shape[2]) if cls else (0,), dtype=torch.float32)
    if _by_triton("cross_attention", q, k, v) or _is_flash(q, queries, k.shape[2], p):
        return _by_token(q.new_empty(q.shape)), q.new_empty((rows, heads, queries), dtype=torch.float32), row
    return q.new_empty(q.shape), _no_row(q), row


@torch.library.custom_op("simla_kernels::cross_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, state: Tensor,
    mask: Tensor | None, index: Tensor | None, p: float, seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _by_triton("cross_attention", q, k, v):
        from simla_kernels import cross_attention_triton as kernels

        assert out is not None  # kept where the log-sum-exp is
        return kernels.backward(dout, q, k, v, out, state, _codes(mask), index, p, int(seed))
    return _torch_backward(dout, q, k, v, out, state, mask, index, p, seed)


@_backward.register_fake
def _(dout, q, k, v, out, state, mask, index, p, seed):
    made = [t.new_empty(t.shape) for t in (q, k, v)]
    if _by_triton("cross_attention", q, k, v) or _is_flash(q, q.shape[2], k.shape[2], p):
        made = [_by_token(t) for t in made]
    return tuple(made)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, index, ctx.p, seed, _ = inputs
    out, state, row = output
    read = out if state.numel() else None  # by the fused paths only
    ctx.save_for_backward(q, k, v, read, state, mask, index, seed)
    ctx.mark_non_differentiable(state, row)
    ctx.set_materialize_grads(False)


def _run_backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 8
    q, k, v, out, state, mask, index, seed = ctx.saved_tensors
    return (*_backward(dout, q, k, v, out, state, mask, index, ctx.p, seed), None, None, None, None, None)


_forward.register_autograd(_run_backward, setup_context=_setup_context)


# Public


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    kv_index: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_cls_row: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the attention output, and on request the first query's undropped attention.

    Args:
        q: (Bq, H, M, D). k, v: (Bk, H, N, D). Any strides; fp32, bf16 or fp16, all alike.
        key_mask: (Bk, N) bool, True at visible keys; None: all are visible.
        kv_index: (Bq,) int64, the key row of each query row; None: row b reads key row b (Bq = Bk). Gradients of a key
            row are summed over its readers in a fixed order.
        dropout_p: chance of dropping an attention weight.
        seed: of the dropout mask: an int or a (1,) int64 CPU tensor; None draws one from PyTorch's CPU generator.
        return_cls_row: also return (Bq, H, N) fp32, without gradient.

    Returns:
        (Bq, H, M, D) in q's dtype; of the fused paths token by token: `out.transpose(1, 2).flatten(2)` copies nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; kv_index out of range (always checked on a
            CPU; on a card with SIMLA_KERNELS_DEBUG=1, since it waits for the device).
    """
    _check(q, k, v, key_mask, kv_index)
    p, seed = float(dropout_p), as_seed("cross_attention", seed, dropout_p)
    made = _by_autograd(q, k, v, key_mask, kv_index, p, return_cls_row)
    if made is not None:
        return made
    out, _, row = _forward(q, k, v, key_mask, kv_index, p, seed, return_cls_row)
    return (out, row) if return_cls_row else out


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, kv_index: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"cross_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be "
            "(Bq, H, M, D), (Bk, H, N, D), (Bk, H, N, D)"
        )
    if k.shape[2] == 0:
        raise ValueError(f"cross_attention: k {tuple(k.shape)} has no keys; give at least one")
    check_kind("cross_attention", q, k, v, key_mask, kv_index)
    if key_mask is not None and (key_mask.shape != (k.shape[0], k.shape[2]) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"cross_attention: key_mask {tuple(key_mask.shape)} {key_mask.dtype} must be "
            f"({k.shape[0]}, {k.shape[2]}) torch.bool"
        )
    if kv_index is None and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"cross_attention: k has {k.shape[0]} rows for {q.shape[0]} of q; give kv_index ({q.shape[0]},)"
        )
    check_index("cross_attention", kv_index, q.shape[0])


def check_kind(op: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless q, k, v are floating, of one dtype, and everything is on one device."""
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q {q.dtype}, k {k.dtype}, v {v.dtype} must be one floating dtype")
    devices = {t.device for t in (q, k, v, *others) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")


def check_index(op: str, kv_index: Tensor | None, rows: int) -> None:
    """Raise ValueError unless kv_index is None or (rows,) int64."""
    if kv_index is not None and (kv_index.shape != (rows,) or kv_index.dtype != torch.int64):
        raise ValueError(f"{op}: kv_index {tuple(kv_index.shape)} {kv_index.dtype} must be ({rows},) torch.int64")


def _check_range(op: str, index: Tensor | None, key_rows: int) -> None:
    """Look at kv_index's values where that costs nothing; on a card it would wait for the device."""
    if index is None or not index.numel():
        return
    if index.device.type != "cpu" and os.environ.get("SIMLA_KERNELS_DEBUG") != "1":
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= key_rows:
        raise ValueError(f"{op}: kv_index has values {low}..{high}, k has rows 0..{key_rows - 1}")


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A lone query; captions over shared pictures; pictures over masked captions with dropout."""
    queries, keys, dim = ((1, 31, 16), (30, 257, 64), (65, 30, 88))[size]
    generator = torch.Generator().manual_seed(size)
    index = torch.tensor([1, 0, 1, 1]) if size == 1 else None
    rows = 2 if index is None else len(index)

    def normal(count: int, length: int) -> Tensor:
        t = torch.randn(count, length, 2, dim, generator=generator).transpose(1, 2)
        return t.to(device, dtype).requires_grad_()

    mask = torch.rand(2, keys, generator=generator) < 0.6
    return {
        "q": normal(rows, queries),
        "k": normal(2, keys),
        "v": normal(2, keys),
        "key_mask": (mask if size == 2 else mask.index_fill(0, torch.tensor([1]), False)).to(device),
        "kv_index": None if index is None else index.to(device),
        "dropout_p": 0.2 if size == 2 else 0.0,
        "seed": 5,
        "return_cls_row": True,
    }


def _reference_of_triton(**arguments: Any) -> Any:
    """The definition with the dropout mask that Triton's kernels draw."""
    q, k, p = arguments["q"], arguments["k"], arguments["dropout_p"]
    shape = (*q.shape[:3], k.shape[2])
    offsets = torch.arange(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]).view(shape)
    keep = philox_uniform(int(arguments["seed"]), offsets) >= p
    return cross_attention_reference(**arguments, keep=keep.to(q.device))


dispatch.register(dispatch.Operation(cross_attention, _reference_of_triton, _example, _refuses))
