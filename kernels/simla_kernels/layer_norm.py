"""dropout_add_layer_norm: what ends each sublayer of a post-LN transformer, in one pass over memory.

    total = residual + dropout(x),   y = (total - mean) * rstd * weight + bias,   rstd = (variance + eps) ** -0.5
x, residual (..., D); mean and variance over D, in fp32 whatever the inputs. Kept for backward: total and two numbers
per row; the dropout mask is made again from its seed.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import dispatch
from simla_kernels.dispatch import Backend, Operation
from simla_kernels.dropout import as_seed, keep_mask, philox_uniform

WIDEST_TRITON_ROW = 4096
"""A row lives in one program's registers."""
CACHED_NUMBERS = 2**18
"""Numbers of a block of rows on a CPU."""


def dropout_add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Return LayerNorm(residual + dropout(x)), by the definition; the mask is the one that the kernels draw."""
    if dropout_p:
        number = int(as_seed("dropout_add_layer_norm_reference", seed, dropout_p))
        uniform = philox_uniform(number, torch.arange(x.numel(), device=x.device).reshape(x.shape))
        x = x * (uniform >= dropout_p) / (1 - dropout_p)
    total = residual + x
    centred = total - total.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def _torch_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dropout_p:
        torch.addcmul(residual, x, keep_mask(seed, x, dropout_p), value=1 / (1 - dropout_p), out=total)
    else:
        torch.add(residual, x, out=total)
    dtype = torch.float32 if _half_on_cpu(x) else x.dtype  # which makes aten return fp32 statistics on a CPU
    parameters = weight.to(dtype), bias.to(dtype)
    y, mean, rstd = torch.native_layer_norm(total, weight.shape, *parameters, eps)
    return y, total, mean.reshape(-1), rstd.reshape(-1)


def _torch_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dropout_p: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = total.shape[-1]
    rows = grad.reshape(-1, width), total.view(-1, width), mean[:, None], rstd[:, None]
    if _half_on_cpu(total):
        grad_total, grad_weight, grad_bias = _half_backward(*rows, weight.float())
    else:
        scale = weight.to(total.dtype)  # also in the bias's place, of which aten looks at nothing
        grad_total, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            rows[0], rows[1], weight.shape, *rows[2:], scale, scale, [True, True, True]
        )
    grad_total = grad_total.view(total.shape)
    grad_x = grad_total.new_empty(0)
    if dropout_p:
        grad_x = keep_mask(seed, grad_total, dropout_p).mul_(grad_total).mul_(1 / (1 - dropout_p))
    return grad_x, grad_total, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _half_backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of total (rows, D), weight and bias: in fp32, over blocks of rows that stay in the cache.

    In half precision aten adds up the parameters' gradients in it, too: 7 % off after 4000 rows of bfloat16.
    """
    grad_total = torch.empty_like(total)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    block = max(1, CACHED_NUMBERS // total.shape[1])
    for start in range(0, total.shape[0], block):
        few = slice(start, start + block)
        of_total, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            grad[few].float(),
            total[few].float(),
            weight.shape,
            mean[few],
            rstd[few],
            weight,
            weight,
            [True, True, True],
        )
        grad_total[few] = of_total
        grad_weight += of_weight
        grad_bias += of_bias
    return grad_total, grad_weight, grad_bias


def _half_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16)


@torch.library.custom_op("simla_kernels::dropout_add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y (..., D), total (..., D), and per row its mean and rstd (rows,)."""
    if _uses_triton(x, residual, weight, bias):
        from simla_kernels import layer_norm_triton

        return layer_norm_triton.forward(x, residual, weight, bias, dropout_p, seed, eps)
    return _torch_forward(x, residual, weight, bias, dropout_p, seed, eps)


@_forward.register_fake
def _(x, residual, weight, bias, dropout_p, seed, eps):
    whole = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_row = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return whole, torch.empty_like(whole), per_row, torch.empty_like(per_row)


@torch.library.custom_op("simla_kernels::dropout_add_layer_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dropout_p: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty without dropout: it is the residual's), residual, weight, bias."""
    if _uses_triton(total, total, weight, weight):
        from simla_kernels import layer_norm_triton

        return layer_norm_triton.backward(grad, total, mean, rstd, weight, dropout_p, seed)
    return _torch_backward(grad, total, mean, rstd, weight, dropout_p, seed)


@_backward.register_fake
def _(grad, total, mean, rstd, weight, dropout_p, seed):
    grad_x = torch.empty_like(total) if dropout_p else total.new_empty(0)
    return grad_x, torch.empty_like(total), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.dropout_p, seed, _ = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total, mean, rstd)
    ctx.save_for_backward(total, mean, rstd, weight, seed)


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    total, mean, rstd, weight, seed = ctx.saved_tensors
    grad_x, grad_total, grad_weight, grad_bias = _backward(grad, total, mean, rstd, weight, ctx.dropout_p, seed)
    return grad_x if ctx.dropout_p else grad_total, grad_total, grad_weight, grad_bias, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Return LayerNorm(residual + dropout(x)) over the last dimension, (..., D) in x's dtype.

    Args:
        x, residual: (..., D), of one dtype.
        weight, bias: (D,), of one dtype, any floating one.
        dropout_p: chance of dropping an element of x, in [0, 1).
        seed: makes the mask repeatable: a number or one int64 on the CPU; None: drawn from PyTorch's CPU generator.
        eps: added to the variance; BERT's is 1e-12.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    _check(x, residual, weight, bias)
    seed = as_seed("dropout_add_layer_norm", seed, dropout_p)
    if not torch.compiler.is_compiling() and not _uses_triton(x, residual, weight, bias):
        if _is_for_apex(x):
            return _apex_forward(x, residual, weight, bias, dropout_p, seed, eps)
        if not dropout_p and not _half_on_cpu(x):  # autograd's own nodes keep as little, and cost less on a CPU
            return F.layer_norm(residual + x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return _forward(x, residual, weight, bias, float(dropout_p), seed, float(eps))[0]


def _uses_triton(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> bool:
    chosen = dispatch.choose("dropout_add_layer_norm", x, lambda: _refuses(x, residual, weight, bias))
    return chosen.name == "triton"


def _is_for_apex(x: Tensor) -> bool:
    return x.device.type == "cuda" and dispatch.wish() == "auto" and _apex() is not None


@cache
def _apex() -> Any:
    """Return Apex's fused function, or None. PyPI's apex is another project and has no `normalization`."""
    try:
        import_module("fused_layer_norm_cuda")
        return import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    except (ImportError, AttributeError):
        return None


def _apex_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: Tensor, eps: float
) -> Tensor:
    if dropout_p:
        x = x * keep_mask(seed, x, dropout_p) * (1 / (1 - dropout_p))
    parameters = weight.to(x.dtype), bias.to(x.dtype)
    return _apex()(residual + x, *parameters, weight.shape, eps)


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"dropout_add_layer_norm: x {tuple(x.shape)} {x.dtype} must be (..., D), floating")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"dropout_add_layer_norm: residual {tuple(residual.shape)} {residual.dtype} must be as x, "
            f"{tuple(x.shape)} {x.dtype}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:] or not parameter.is_floating_point() or parameter.dtype != weight.dtype:
            raise ValueError(
                f"dropout_add_layer_norm: {name} {tuple(parameter.shape)} {parameter.dtype} must be "
                f"({x.shape[-1]},) {weight.dtype if name == 'bias' else 'floating'}"
            )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(
                f"dropout_add_layer_norm: {name} {tuple(tensor.shape)} on {tensor.device} must be on {x.device}, as x"
            )


def _refuses(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *_: Any, **__: Any) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; the kernels take float32, bfloat16 and float16"
    if x.shape[-1] > WIDEST_TRITON_ROW:
        return f"rows of {x.shape[-1]} are wider than {WIDEST_TRITON_ROW}"
    return None


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    shape, dropout_p = [((3, 17), 0.0), ((3, 5, 768), 0.1), ((5, 2050), 0.5)][size]
    generator = torch.Generator().manual_seed(size)

    def draw(*of: int) -> Tensor:
        return torch.randn(of, generator=generator).to(device, dtype).requires_grad_()

    width = shape[-1]
    tensors = {"x": draw(*shape), "residual": draw(*shape), "weight": draw(width), "bias": draw(width)}
    return {**tensors, "dropout_p": dropout_p, "seed": 12345 + size, "eps": 1e-12}


dispatch.register(
    Operation(
        function=dropout_add_layer_norm,
        reference=dropout_add_layer_norm_reference,
        example=_example,
        refuses=_refuses,
        instead=lambda x: Backend("apex", "NVIDIA Apex is installed") if _is_for_apex(x) else None,
    )
)
