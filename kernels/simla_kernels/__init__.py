"""Fused operations for single-stream vision-language models. Needs torch only; see kernels/README.md."""

from simla_kernels.attention import cross_attention, cross_attention_reference

__all__ = ["cross_attention", "cross_attention_reference"]
