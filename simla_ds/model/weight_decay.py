"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

UNDECAYED = ("temperature.value", "cls_token", "pos_embed", "mask_token")
"""Not matrices in spirit: exempt when corrected; the published optimizer factory decays them."""


def parameter_groups(model: nn.Module, weight_decay: float, *, official: bool) -> list[dict[str, Any]]:
    """Split trainable parameters into a decayed and an undecayed group for AdamW.

    Undecayed are vectors and biases, and when corrected also tokens, positions and the temperature. The temperature is
    stored as (1,) but published as 0-dim, which the published rule decays.
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        special = name.endswith(UNDECAYED)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # partitioned under ZeRO-3, it is empty itself
        plain_vector = len(shape) <= 1 and not special
        skip = plain_vector or name.endswith(".bias") or (special and not official)
        (exempt if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
