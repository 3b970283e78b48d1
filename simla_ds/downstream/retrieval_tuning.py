"""Fine-tuning for retrieval and grounding: pretraining's ITC and ITM, where every caption of a picture is right.

The evaluation is in simla_ds.downstream.retrieval.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from simla_ds.config import ObjectivesConfig
from simla_ds.downstream.base import Downstream, TaskBatch
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher


def retrieval_objectives(objectives: ObjectivesConfig) -> ObjectivesConfig:
    """Return pretraining's objectives with ITC over image ids and ITM alone."""
    off = {name: replace(getattr(objectives, name), weight=0.0) for name in ("mlm", "xmm", "psl")}
    return replace(objectives, **off, itc=replace(objectives.itc, positives="image"))


class Retrieval(Downstream):
    """The pretrained network itself; its trainer's module is a PretrainTask with two objectives."""

    name = "retrieval"
    network = Simla
    metric = "r_mean"

    def loss(self, student: Simla, teacher: Simla, batch: TaskBatch, alpha: float) -> Tensor:
        """Raise: objectives ask for their passes together (see module)."""
        raise NotImplementedError("retrieval's loss is that of its objectives; use module()")

    def module(self, model: Simla, teacher: Teacher, config: FinetuneConfig) -> nn.Module:
        """Return a PretrainTask of ITC and ITM."""
        config = replace(config, objectives=retrieval_objectives(config.objectives))
        size, width = config.objectives.itc.queue_size, model.config.projection_size
        return PretrainTask(model, teacher, FeatureQueue(size, width), config)
