"""Bytes that a rank holds, by part, at every ZeRO stage; and the most that it holds at once.

P parameters, n ranks. What DeepSpeed 0.19 keeps was read in its sources and holds in float32 and half precision alike,
unless a line says otherwise. `benchmarks memory` counts the same while the real trainer runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from simla_ds.config import Config, ModelConfig
from simla_ds.model.simla import Simla
from simla_ds.planner.activations import activations
from simla_ds.planner.shape import StepShape
from simla_kernels.linear_chunks import CARD_CHUNK_BYTES, CHUNK_BYTES

FULL = 4
"""Bytes of a float32 number."""
STAGE_0_BUCKET = 500_000_000
"""Gradients that stage 0 flattens at a time to reduce them (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)."""
TEACHER_BUCKET = 2**24
"""Numbers of all ranks that one all-gather of the teacher's brings (engine.zero_teacher.BUCKET)."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What of a DeepSpeed file's zero_optimization decides memory; defaults are those of ds_configs/."""

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 50_000_000
    """Gradients reduced at a time."""
    gather_bucket: int = 50_000_000
    """Weights gathered ahead at stage 3."""
    live: int = 1_000_000_000
    """Weights that stay whole for being used again soon, at stage 3."""
    sub_group: int = 1_000_000_000
    """Weights stepped at a time at stage 3."""

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Zero:
        """Return a DeepSpeed file's, DeepSpeed's own defaults where it says nothing or "auto".

        Raises ValueError for ZeRO++'s second copy of the weights, which is not described here.
        """
        zero = {name: value for name, value in settings.get("zero_optimization", {}).items() if value != "auto"}
        if (size := zero.get("zero_hpz_partition_size", 1)) != 1:
            raise ValueError(
                f"the plan's formulas leave out the second copy of the weights of zero_hpz_partition_size {size}: plan "
                "with 1, and add the weights in the training dtype divided by it"
            )

        def offloads(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") != "none"

        return cls(
            stage=int(zero.get("stage", 0)),
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            gather_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            live=int(zero.get("stage3_max_live_parameters", 1e9)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
        )

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}" + (", offloaded" if self.offload_optimizer or self.offload_param else "")


LAYOUTS = (
    Zero(stage=0),
    Zero(stage=1),
    Zero(stage=2),
    Zero(stage=2, offload_optimizer=True),
    Zero(stage=3),
    Zero(stage=3, offload_optimizer=True, offload_param=True),
)
"""Those of ds_configs/."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, on its device unless said otherwise."""

    parts: dict[str, float] = field(default_factory=dict)
    """Held from step to step: weights, optimizer, teacher, teacher copy, queue, batch; with accumulation gradients."""
    gradients: float = 0.0
    """There at the end of backward."""
    activations: float = 0.0
    """Kept for backward."""
    logits: float = 0.0
    """Chunks of the loss heads' logits, student's and teacher's; while all activations are there."""
    gathered: float = 0.0
    """Weights that are whole during forward and backward at stage 3."""
    buckets: float = 0.0
    """Where DeepSpeed lays gradients together to reduce them."""
    step: float = 0.0
    """Copies of gradients that are made to reduce them or for the optimizer's step."""
    refresh: float = 0.0
    """What the teacher's copy is refreshed through, after the step."""
    host: float = 0.0
    """Bytes of host memory instead of the device's, where something is offloaded."""

    @property
    def resident(self) -> float:
        """Held from step to step."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """The most at once. In backward gradients come while activations go: counted as if none had gone yet."""
        backward = self.activations + max(self.logits, self.gradients + self.buckets) + self.gathered
        return self.resident + max(backward, self.gradients + self.step, self.refresh)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many there are."""

    encoder: int
    """In the layers of the image encoder."""
    stream: int
    """In the layers of the stream."""
    outside: int
    """In embeddings, heads and whatever else is no layer."""

    @property
    def total(self) -> int:
        """P."""
        return self.encoder + self.stream + self.outside


def count_parameters(config: ModelConfig) -> Parameters:
    """Count a model's, without making its weights."""
    with torch.device("meta"):
        model = Simla(config)
    total, encoder, stream = (
        sum(p.numel() for p in module.parameters())
        for module in (model, model.image_encoder.blocks, model.stream.layers)
    )
    return Parameters(encoder=encoder, stream=stream, outside=total - encoder - stream)


def plan_memory(
    config: Config, shape: StepShape, zero: Zero, ranks: int, size: int, parameters: Parameters, *, cpu: bool = False
) -> Memory:
    """Return what one rank holds.

    Args:
        config: model, queue, checkpointing. shape: its micro-batch.
        zero: stage and buckets. ranks: n. size: bytes of a number in the training dtype.
        parameters: counted. cpu: trained on a CPU, whose attention pads and whose heads have smaller chunks, over gloo.
    """
    whole, share = float(parameters.total), parameters.total / (ranks if zero.stage else 1)
    kept = activations(config, shape, size, padded=cpu, checkpointing=config.train.activation_checkpointing)
    gradients = _gradients(whole, share, size, zero)
    parts = {
        "weights": size * (share if zero.stage == 3 else whole),
        # float32 weights and two moments; in float32 stage 0 needs no second copy of the weights
        "optimizer": FULL * share * (3 if zero.stage or size < FULL else 2),
        "gradients": gradients.resident,
        **_teacher(parameters, share, size, zero.stage, ranks),
        "queue": config.objectives.itc.queue_size * (2 * config.model.projection_size * FULL + 8),
        # on a card the next one is made ready beside the backward pass
        "batch": shape.pairs * 3 * config.model.vision.image_size**2 * FULL * (1 if cpu else 2),
        "buckets": FULL * zero.bucket if zero.stage == 3 else 0.0,
    }
    away, host = list[str](), 0.0
    if zero.offload_optimizer:  # the teacher's master lies where the optimizer's weights do
        away += ["optimizer", "teacher", "gradients"]
        host = gradients.after_backward
        gradients = _Gradients(0.0, 0.0, 0.0, gradients.bucket)
    if zero.offload_param:
        away += ["weights"]
    # the teacher's share, what is gathered of all of them, and on a CPU gloo's own copy of that
    copies = 1 / ranks + 1 + cpu if zero.stage in (1, 2) and ranks > 1 else 0.0
    live = min(whole, zero.live + zero.gather_bucket) if zero.stage == 3 and ranks > 1 else 0.0
    return Memory(
        parts={name: value for name, value in parts.items() if name not in away and value},
        gradients=gradients.after_backward,
        activations=kept.total + (kept.layer if config.train.activation_checkpointing else 0.0),
        logits=2 * min(CHUNK_BYTES if cpu else CARD_CHUNK_BYTES, _most_logits(config, shape)),
        gathered=size * live,
        buckets=gradients.bucket,
        step=gradients.step,
        refresh=size * min(whole, TEACHER_BUCKET) * copies,
        host=host + sum(parts[name] for name in away),
    )


def _teacher(parameters: Parameters, share: float, size: int, stage: int, ranks: int) -> dict[str, float]:
    """The float32 master, of which each rank averages its share, and the copy that computes.

    The copy is whole, but at stage 3 layers are filled for their forward alone. In float32 a parameter that a rank
    holds whole is both: all of them alone or at stage 0, most at stages 1 and 2.
    """
    master = FULL * share
    if size == FULL and (stage < 3 or ranks == 1):
        return {"teacher": master, "teacher copy": FULL * (parameters.total - share)}
    return {"teacher": master, "teacher copy": size * (parameters.outside if stage == 3 else parameters.total)}


class _Gradients(NamedTuple):
    """Bytes of gradients."""

    resident: float
    """From step to step."""
    after_backward: float
    """Besides, when backward ends."""
    step: float
    """Copies made then, to reduce them or for the optimizer's step."""
    bucket: float
    """What backward reduces at a time: in the training dtype, and in half precision again in float32."""


def _gradients(whole: float, share: float, size: int, zero: Zero) -> _Gradients:
    half = size < FULL
    bucket = (size + half * FULL) * zero.bucket
    if zero.stage == 0:
        return _Gradients(0.0, size * whole, max(size * min(whole, STAGE_0_BUCKET), half * FULL * whole), 0.0)
    if zero.stage == 1 and half:  # BF16_Optimizer: accumulated whole in float32, flattened once more to be reduced
        return _Gradients(FULL * whole, size * whole, FULL * min(whole, STAGE_0_BUCKET), 0.0)
    if zero.stage == 3:
        return _Gradients(FULL * share, 0.0, FULL * min(share, zero.sub_group), FULL * zero.bucket)
    return _Gradients(0.0, FULL * share, 0.0 if half else FULL * share, bucket)


def _most_logits(config: Config, shape: StepShape) -> float:
    """Return bytes of the larger head's logits, if they were made at once."""
    words, codes = config.model.vocabulary.size, config.model.vocabulary.visual_size
    return FULL * max(shape.labelled * words, shape.masked * codes)
