"""The second half of a feed-forward layer, whose input is made again in backward instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GeluLinear(nn.Linear):
    """A linear layer of gelu(x) that keeps x alone: GELU's result is as wide, and cheap to make again.

    A module, not a function of another module's weight: under ZeRO-3 the weight is whole in its own forward only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) before the erf GELU to (..., out_features)."""
        return _GeluLinear.apply(input, self.weight, self.bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, gradients[0]
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        weight = weight.to(grad.dtype)  # another only under autocast
        return (
            torch.ops.aten.gelu_backward(grad @ weight, x) if of_x else None,
            rows.T @ F.gelu(x).flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias and ctx.has_bias else None,
        )
