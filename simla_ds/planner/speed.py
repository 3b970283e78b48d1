"""Seconds of an optimizer step: arithmetic at a stated share of the peak, and what is sent, at the links' bandwidth.

Nothing is taken to overlap, so that a run that overlaps them is faster. n ranks, P parameters; a ring sends
(n - 1) / n of a tensor to gather or to scatter it, twice that to reduce it on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from simla_ds.config import Config
from simla_ds.planner.cards import Card
from simla_ds.planner.memory import FULL, Zero
from simla_ds.planner.operations import recomputed_operations, step_operations
from simla_ds.planner.shape import StepShape

HOST = 25e9
"""Bytes per second between a card and its host, and as many through the host's AdamW (assumed)."""
TOUCHED = 40
"""Bytes of a parameter that AdamW and the teacher's average read and write."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes that a rank sends in an optimizer step."""

    gradients: float
    weights: float
    """Gathered by the optimizer at stages 1 and 2, by the forward and backward passes at stage 3."""
    teacher: float
    """To refresh the copy that computes."""
    features: float
    """The contrast's keys."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.weights + self.teacher + self.features


def bytes_sent(config: Config, zero: Zero, ranks: int, size: int, parameters: int) -> Sent:
    """Return what one rank sends; gradients travel in float32 (communication_data_type of ds_configs)."""
    ring, micro = (ranks - 1) / ranks, config.train.grad_accumulation
    gradients = ring * FULL * parameters
    gradients *= micro if zero.stage == 3 else 2 * (micro if zero.stage == 2 else 1)  # stages 0 to 2 reduce everywhere
    weights = ring * size * parameters if zero.stage else 0.0
    if zero.stage == 3:  # what is not kept whole between forward and backward is gathered twice
        weights *= micro * (1 + max(0.0, 1 - zero.live / parameters))
    keys = config.train.batch_size * (2 * config.model.projection_size * FULL + 8)
    keys *= 2 if config.objectives.itc.queue_size else 1  # once for the contrast, once for the queue
    return Sent(
        gradients=gradients,
        weights=weights,
        teacher=ring * size * parameters if zero.stage else 0.0,
        features=(ranks - 1) * keys * micro,
    )


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of an optimizer step, by what takes them."""

    compute: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.compute + self.optimizer + self.communication


def step_seconds(
    config: Config,
    shape: StepShape,
    zero: Zero,
    card: Card,
    nodes: int,
    ranks: int,
    size: int,
    parameters: int,
    utilisation: float,
) -> Seconds:
    """Return the seconds of an optimizer step of train.grad_accumulation micro-steps."""
    operations = step_operations(config, shape)
    if config.train.activation_checkpointing:
        operations += recomputed_operations(config, shape)
    share = parameters / (ranks if zero.stage else 1)
    optimizer = TOUCHED * share / card.bandwidth
    if zero.offload_optimizer:
        optimizer = (TOUCHED + FULL + size) * share / HOST
    sent = bytes_sent(config, zero, ranks, size, parameters).total
    return Seconds(
        compute=config.train.grad_accumulation * operations / (card.flops * utilisation),
        optimizer=optimizer,
        communication=sent / (card.network if nodes > 1 else card.link) if ranks > 1 else 0.0,
    )
