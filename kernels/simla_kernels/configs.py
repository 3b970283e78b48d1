"""Launch configurations of every kernel, fixed, by size class: the one place to look at and to change.

They were chosen by compiling for every architecture of launching.ARCHITECTURES (no spills, few enough registers,
shared memory within the smallest card's limit); no card has timed them yet. One configuration serves all cards unless
OVERRIDES names another for an architecture, or a file of tuned ones (tuning.py, opt-in) has one for this very card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simla_kernels import tuned
from simla_kernels.launching import LaunchConfig, architecture

CONFIGS: dict[tuple[str, str], LaunchConfig] = {
    # cross_attention: dtype, head size up to 64 or 128, short (a caption) or long queries (dkdv: keys)
    ("cross_attention.forward", "half d64 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4),
    ("cross_attention.forward", "half d64 long"): LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4),
    ("cross_attention.forward", "half d128 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.forward", "half d128 long"): LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.forward", "fp32 d64 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.forward", "fp32 d64 long"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.forward", "fp32 d128 short"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.forward", "fp32 d128 long"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dq", "half d64 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4),
    ("cross_attention.dq", "half d64 long"): LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4),
    ("cross_attention.dq", "half d128 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dq", "half d128 long"): LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dq", "fp32 d64 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dq", "fp32 d64 long"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dq", "fp32 d128 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8),
    ("cross_attention.dq", "fp32 d128 long"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8),
    ("cross_attention.dkdv", "half d64 short"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dkdv", "half d64 long"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dkdv", "half d128 short"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dkdv", "half d128 long"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.dkdv", "fp32 d64 short"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4),
    ("cross_attention.dkdv", "fp32 d64 long"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4),
    ("cross_attention.dkdv", "fp32 d128 short"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8),
    ("cross_attention.dkdv", "fp32 d128 long"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8),
    ("cross_attention.cls_row", "any"): LaunchConfig({"BLOCK_N": 64}, num_warps=4),
    ("layer_norm.forward", "narrow"): LaunchConfig({"BLOCK_ROWS": 16}, num_warps=4),
    ("layer_norm.forward", "medium"): LaunchConfig({"BLOCK_ROWS": 2}, num_warps=4),
    ("layer_norm.forward", "wide"): LaunchConfig({"BLOCK_ROWS": 1}, num_warps=8),
    ("layer_norm.backward", "narrow"): LaunchConfig({"BLOCK_ROWS": 8}, num_warps=4),
    ("layer_norm.backward", "medium"): LaunchConfig({"BLOCK_ROWS": 1}, num_warps=4),
    ("layer_norm.backward", "wide"): LaunchConfig({"BLOCK_ROWS": 1}, num_warps=16),
    ("linear_soft_bce.row_loss", "any"): LaunchConfig({"BLOCK_V": 2048}, num_warps=8),
    ("linear_soft_ce.row_loss", "any"): LaunchConfig({"BLOCK_V": 2048}, num_warps=8),
    ("contrastive_loss.attend", "half"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}, num_warps=4),
    ("contrastive_loss.attend", "fp32 few"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}, num_warps=4),
    ("contrastive_loss.attend", "fp32 many"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=8),
}
"""(kernel, size class) -> configuration."""

OVERRIDES: dict[tuple[str, str, str], LaunchConfig] = {
    ("cross_attention.forward", "half d128 long", "sm_80"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4),
    ("cross_attention.dq", "half d128 long", "sm_90"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8),
    # as many threads as leave each of them 128 bits of a row: gfx942's warps are twice as wide
    ("layer_norm.backward", "narrow", "gfx942"): LaunchConfig({"BLOCK_ROWS": 16}, num_warps=4),
    ("layer_norm.backward", "medium", "gfx942"): LaunchConfig({"BLOCK_ROWS": 1}, num_warps=2),
    ("layer_norm.backward", "wide", "gfx942"): LaunchConfig({"BLOCK_ROWS": 1}, num_warps=8),
    ("cross_attention.forward", "half d64 long", "sm_100"): LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8),
    ("cross_attention.forward", "half d128 short", "sm_100"): LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4),
    # a load pipeline costs registers on gfx942, and dk, dv have none to give
    ("cross_attention.dkdv", "half d64 short", "gfx942"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, 4, 1),
    ("cross_attention.dkdv", "half d64 long", "gfx942"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, 4, 1),
    ("cross_attention.dkdv", "half d128 short", "gfx942"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, 8, 1),
    ("cross_attention.dkdv", "half d128 long", "gfx942"): LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 32}, 8, 1),
}
"""(kernel, size class, architecture) -> what suits that architecture better."""


_trial: dict[tuple[str, str], LaunchConfig] | None = None


def config(kernel: str, size_class: str, device: torch.device) -> LaunchConfig:
    """Return the configuration of a kernel on a device."""
    fixed = OVERRIDES.get((kernel, size_class, architecture(device)), CONFIGS[kernel, size_class])
    if _trial is not None:
        return _trial.setdefault((kernel, size_class), fixed)
    return tuned.configs(device).get((kernel, size_class), fixed)


@contextmanager
def trying(chosen: dict[tuple[str, str], LaunchConfig]) -> Iterator[None]:
    """Within this context launches take `chosen`; what it lacks is added to it, as fixed, when it is asked for."""
    global _trial
    _trial = chosen
    try:
        yield
    finally:
        _trial = None
