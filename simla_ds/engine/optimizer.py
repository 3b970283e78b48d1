"""What DeepSpeed's own optimizer leaves to do: the schedule, counted in pairs, and a clean start.

Parameter groups come from simla_ds.model.weight_decay; the optimizer itself from deepspeed_config.
"""

from __future__ import annotations

import math

import torch

from simla_ds.config import Config
from simla_ds.engine.zero_layout import Engine, replicated_masters


def learning_rate(config: Config, samples_seen: int, total_samples: int, global_batch: int) -> float:
    """Return the learning rate of the optimizer step that follows samples_seen pairs.

    Linear warm-up from start_learning_rate, then a cosine to min_learning_rate at total_samples (or constant); all of
    it times the rule for the batch (Config.learning_rate_scale).
    """
    optim = config.optim
    if samples_seen < optim.warmup_samples:
        share = samples_seen / optim.warmup_samples
        rate = optim.start_learning_rate + share * (optim.learning_rate - optim.start_learning_rate)
    elif optim.schedule == "constant":
        rate = optim.learning_rate
    else:
        progress = (samples_seen - optim.warmup_samples) / max(1, total_samples - optim.warmup_samples)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        rate = optim.min_learning_rate + cosine * (optim.learning_rate - optim.min_learning_rate)
    return rate * config.learning_rate_scale(global_batch)


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Use a learning rate from the next step on, for every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def forget_initial_step(engine: Engine) -> None:
    """Undo the optimizer step that DeepSpeed makes when it is built at stage 0 in bf16 or fp16.

    It allocates AdamW's state by a step with zero gradients, which decays the weights once and leaves the step counter
    at 1: the first real update would be 0.74 of what it is at every other stage. To be called before any step.
    """
    optimizer = engine.optimizer
    masters = replicated_masters(optimizer)
    if not masters:
        return
    optimizer.optimizer.state.clear()  # made again by the first step
    for group in optimizer.optimizer.param_groups:
        group.pop("step", None)  # where FusedAdam counts
    for parameter in engine.module.parameters():
        if id(parameter) in masters:
            masters[id(parameter)].copy_(parameter)
