"""Fused operations for single-stream vision-language models. Needs torch only; see kernels/README.md."""

from simla_kernels.cross_attention import cross_attention, cross_attention_reference
from simla_kernels.cross_attention_varlen import cross_attention_varlen, cross_attention_varlen_reference
from simla_kernels.dispatch import Backend, backend

__all__ = [
    "Backend",
    "backend",
    "cross_attention",
    "cross_attention_reference",
    "cross_attention_varlen",
    "cross_attention_varlen_reference",
]
