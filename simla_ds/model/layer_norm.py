"""LayerNorm alone (NVIDIA Apex's where it is installed, else torch's) and as the tail of a post-LN block."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from simla_kernels import dropout_add_layer_norm


def layer_norm(width: int, eps: float) -> nn.LayerNorm:
    """Return a LayerNorm over the last dimension of (..., width); Apex's has the same members."""
    try:
        return apex_layer_norm()(width, eps=eps)
    except ImportError:
        return nn.LayerNorm(width, eps=eps)


def apex_layer_norm() -> type[nn.LayerNorm]:
    """Return NVIDIA Apex's class. Raises ImportError without it and its compiled extension.

    PyPI's package of that name is another project and has neither.
    """
    import_module("fused_layer_norm_cuda")
    return import_module("apex.normalization").FusedLayerNorm


class ResidualLayerNorm(nn.Module):
    """LayerNorm(residual + dropout(x)): what follows attention and feed-forward in a post-LN block (BERT)."""

    def __init__(self, width: int, eps: float, dropout: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps, self.dropout = eps, dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., D) each, to (..., D)."""
        dropout = self.dropout if self.training else 0.0
        x = x.to(residual.dtype)  # autocast computes x in half precision; else they are alike
        return dropout_add_layer_norm(x, residual, self.weight, self.bias, dropout, eps=self.eps)
