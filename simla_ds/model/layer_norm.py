"""LayerNorm: NVIDIA Apex's fused one where it is installed, else torch's. Both hold `weight` and `bias`."""

from __future__ import annotations

from importlib import import_module

from torch import nn


def layer_norm(width: int, eps: float) -> nn.LayerNorm:
    """Return a LayerNorm over the last dimension of (..., width); Apex's has the same members.

    Apex counts only with its compiled extension. PyPI's package of that name is another project and has neither.
    """
    try:
        import_module("fused_layer_norm_cuda")
        fused = import_module("apex.normalization").FusedLayerNorm
    except ImportError:
        return nn.LayerNorm(width, eps=eps)
    return fused(width, eps=eps)
