"""One pretraining step: features, requests, passes, losses, their weighted sum.

PretrainTask is the one module that the DeepSpeed engine wraps, called once per micro-batch. Objectives ask for passes
and the task has them run (see passes.py for how).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simla_ds.config import Config
from simla_ds.model.simla import Simla
from simla_ds.objectives import OBJECTIVES, FeatureQueue, Objective
from simla_ds.objectives.base import Networks
from simla_ds.objectives.itc import contrast_keys, entropy, excluded_keys, image_similarities
from simla_ds.passes import PASSES
from simla_ds.teacher import Teacher
from simla_ds.types import Batch, ContrastKeys, Features, Outputs, Request, StepFeatures


class PretrainTask(nn.Module):
    """Student, teacher and objectives. Only the student is a submodule: the engine must not see the teacher."""

    def __init__(self, model: Simla, teacher: Teacher, queue: FeatureQueue, config: Config):
        super().__init__()
        self.model = model
        self.config = config
        self.queue = queue
        self.passes = PASSES[config.train.passes]()
        self._teacher = [teacher]  # in a list, so that it is not registered as a submodule
        networks = Networks(model, teacher.module)
        for network in (model, teacher.module):
            network.image_encoder.visible_patches = config.visible_patches
        self.objectives: dict[str, Objective] = {
            name: OBJECTIVES[name](networks, config.objectives, model.config.vocabulary)
            for name in config.objectives.enabled
        }
        counts = {"mlm": "label_count", "xmm": "masked_count"}
        self.counted = tuple(count for name, count in counts.items() if name in self.objectives)
        """What of a batch the trainer replaces by its mean over ranks and micro-steps, unless `official`."""

    @property
    def teacher(self) -> Teacher:
        """The momentum teacher."""
        return self._teacher[0]

    def forward(self, batch: Batch, *, alpha: float, step: int = 0, keep: bool = False) -> dict[str, Any]:
        """Run one micro-batch.

        Args:
            batch: see types.Batch.
            alpha: weight of the teacher's targets.
            step: optimizer step, for objectives that run at every k-th only.
            keep: also return the intermediate `features` and `outputs`, for evaluation and verification.

        Returns:
            `loss`: the weighted sum, a scalar with gradient. `losses`: name -> detached scalar.
            `queue_rows`: what FeatureQueue.push takes, after the step. `monitor`: name -> detached scalar.
            `by_source`, when the batch says where pairs are from: `pairs` and the objectives' names -> (sources, 2)
            float32, the sum of weighted losses and the sum of weights.
        """
        objectives = self.active(step)
        features = self.features(batch, masked="xmm" in objectives)
        outputs = self.outputs(batch, features, objectives)
        losses = {name: o.loss(batch, features, outputs[name], alpha) for name, o in objectives.items()}
        total = torch.stack([loss * self._weight(name) for name, loss in losses.items()]).sum()
        result = {
            "loss": total,
            "losses": {name: loss.detach() for name, loss in losses.items()},
            "queue_rows": {
                "image_feature": features.teacher.image_feature,
                "text_feature": features.teacher.text_feature,
                "image_id": None if self._forgets_ids else batch["image_id"],
            },
            "monitor": self._monitor(batch, features),
        }
        if "source" in batch:
            rows = {name: o.row_losses(batch, features, outputs[name], alpha) for name, o in objectives.items()}
            result["by_source"] = self._by_source(batch["source"], rows)
        return {**result, "features": features, "outputs": outputs} if keep else result

    def active(self, step: int) -> dict[str, Objective]:
        """Return the objectives that run at an optimizer step, by name."""
        due = step % self.config.objectives.xmm.every == 0
        return {name: objective for name, objective in self.objectives.items() if name != "xmm" or due}

    def features(self, batch: Batch, *, masked: bool = True) -> StepFeatures:
        """Run what comes before any cross-modal pass, by student and teacher, and collect ITC's keys."""
        xmm = self.config.objectives.xmm
        encoded = masked and xmm.text_keys == "encoded"
        student = self.passes.features(self.model, batch, masked=masked, every_text_token=encoded)
        with torch.no_grad():
            teacher = self.passes.features(
                self.teacher.module, batch, masked=masked and xmm.distill, every_text_token=False
            )
        return StepFeatures(student, teacher, self.contrast_keys(teacher, batch))

    def contrast_keys(self, teacher: Features, batch: Batch) -> ContrastKeys:
        """Return what the student's features are compared with."""
        temperature, positives = self.model.temperature(), self.config.objectives.itc.positives
        return contrast_keys(
            teacher, batch, temperature, self.queue, official=self.config.official, positives=positives
        )

    def outputs(self, batch: Batch, features: StepFeatures, objectives: dict[str, Objective]) -> dict[str, Outputs]:
        """Collect every objective's requests and run them."""
        asked = [(name, request) for name, o in objectives.items() for request in o.requests(batch, features)]
        results: dict[str, list[Tensor]] = {name: [] for name in objectives}
        done = self.run([request for _, request in asked])
        for (name, _), result in zip(asked, done, strict=True):
            results[name].append(result)
        return {name: Outputs(parts) for name, parts in results.items()}

    def run(self, requests: Sequence[Request]) -> list[Tensor]:
        """Run the teacher's requests, then the student's; return what each reads, in the order they came in."""
        results = {}
        for by, network in (("teacher", self.teacher.module), ("student", self.model)):
            numbers = [number for number, request in enumerate(requests) if request.by == by]
            with torch.set_grad_enabled(torch.is_grad_enabled() and by == "student"):
                done = self.passes.run(network, [requests[number] for number in numbers])
            results.update(zip(numbers, done, strict=True))
        return [results[number] for number in range(len(requests))]

    @property
    def _forgets_ids(self) -> bool:
        """Published retrieval matches queued ids but never writes them (ALBEF's does)."""
        return self.config.official and self.config.objectives.itc.positives == "image"

    def _weight(self, name: str) -> float:
        return getattr(self.config.objectives, name).weight

    def _by_source(self, source: Tensor, rows: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        """Add up rows' losses and weights by the source of their pair; `pairs` counts pairs."""
        ones = torch.ones(len(source), device=source.device)
        rows = {"pairs": (ones, ones, torch.arange(len(source), device=source.device)), **rows}
        zeros = torch.zeros(len(self.config.data.sources), 2, device=source.device)
        return {
            name: zeros.index_add(0, source.index_select(0, pairs), torch.stack([losses * weights, weights], 1))
            for name, (losses, weights, pairs) in rows.items()
        }

    @torch.no_grad()
    def _monitor(self, batch: Batch, features: StepFeatures) -> dict[str, Tensor]:
        """Return what shows a collapse early: temperature, target entropy, spread of features, teacher's nearness."""
        student, teacher, keys = features.student, features.teacher, features.keys
        excluded = excluded_keys(batch, keys, self.config.objectives.itc.positives)
        return {
            "temperature": self.model.temperature().squeeze(),
            "itc_target_entropy": entropy(image_similarities(teacher, keys), excluded).mean(),
            "image_feature_spread": _spread(student.image_feature),
            "text_feature_spread": _spread(student.text_feature),
            "teacher_student_cosine": (student.image_feature * teacher.image_feature).sum(-1).mean(),
        }


def _spread(features: Tensor) -> Tensor:
    """Return 1 - |mean of unit vectors|^2: 0 when all features are the same, near 1 when they are spread."""
    return 1 - features.mean(0).square().sum()
