"""Fused operations for single-stream vision-language models. Needs torch only; see kernels/README.md."""

from simla_kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference
from simla_kernels.cross_attention import cross_attention, cross_attention_reference
from simla_kernels.cross_attention_varlen import cross_attention_varlen, cross_attention_varlen_reference
from simla_kernels.dispatch import Backend, backend
from simla_kernels.ema import ema_update_, ema_update_reference
from simla_kernels.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_reference
from simla_kernels.linear_soft_bce import linear_soft_bce, linear_soft_bce_reference
from simla_kernels.linear_soft_ce import linear_soft_ce, linear_soft_ce_reference
from simla_kernels.linear_soft_ce_over_positions import (
    linear_soft_ce_over_positions,
    linear_soft_ce_over_positions_reference,
)

__all__ = [
    "Backend",
    "backend",
    "contrastive_loss",
    "contrastive_loss_reference",
    "cross_attention",
    "cross_attention_reference",
    "cross_attention_varlen",
    "cross_attention_varlen_reference",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_reference",
    "ema_update_",
    "ema_update_reference",
    "linear_soft_bce",
    "linear_soft_bce_reference",
    "linear_soft_ce",
    "linear_soft_ce_over_positions",
    "linear_soft_ce_over_positions_reference",
    "linear_soft_ce_reference",
]
