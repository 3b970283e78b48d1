"""How the summed losses of linear_soft_ce and linear_soft_bce meet autograd: their gradients are made in forward.

Both are custom ops (h, weight, bias, teacher_h, teacher_weight, teacher_bias, targets, alpha, wanted) -> (sum of the
losses, gradients of h, weight and bias).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from simla_kernels.linear_chunks import Gradients, empty_gradients, exact, gradients_times, keeps_dz

INPUTS = 9


def register(operation: Any) -> None:
    """Give a custom op of that form its fake and its backward, which reads no weight (ZeRO-3 has none by then)."""
    operation.register_fake(_fake)
    operation.register_autograd(_backward, setup_context=_setup_context)


def _fake(h: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = empty_gradients(h, weight, rest[-1])
    return h.new_empty((), dtype=exact(h.dtype)), made.h, made.weight, made.bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, wanted = inputs[0], inputs[1], inputs[-1]
    ctx.kept, ctx.wanted = wanted[1] and keeps_dz(h, weight), wanted
    ctx.save_for_backward(h, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * INPUTS
    h, *gradients = ctx.saved_tensors
    made = gradients_times(grad_out, Gradients(*gradients), h, ctx.kept, ctx.wanted)
    return *made, *(None,) * (INPUTS - 3)
