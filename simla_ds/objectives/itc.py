"""Image-text contrast: does a picture lie nearer to its own caption than to others?  (SIMLA section 3.3, as ALBEF)

B pairs, G keys of the batch (all ranks when corrected, this rank's when official), Q filled queue rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ds.objectives.base import Objective
from simla_ds.objectives.collectives import gather_rows, own_rows
from simla_ds.objectives.feature_queue import FeatureQueue
from simla_ds.objectives.soft_targets import soft_target_cross_entropy
from simla_ds.types import Batch, Features, Outputs, Request, Similarities, StepFeatures

EXCLUDED_LOGIT = -1e4
"""Logit of a key that is neither positive nor negative. Finite: 0 * -inf would be NaN in the soft cross-entropy."""


def similarities(
    student: Features, teacher: Features, batch: Batch, temperature: Tensor, queue: FeatureQueue, *, official: bool
) -> Similarities:
    """Compare the student's features with the teacher's features of this batch and of the queue.

    temperature is (1,) float32 and gets its gradient only here.
    """
    rows, device = student.image_feature.shape[0], student.image_feature.device
    queue_image, queue_text, queue_id = queue.keys()
    if official:
        batch_image, batch_text = teacher.image_feature, teacher.text_feature
        own, excluded = torch.arange(rows, device=device), None
    else:
        batch_image, batch_text = gather_rows(teacher.image_feature), gather_rows(teacher.text_feature)
        own = own_rows(rows, device)
        key_id = torch.cat([gather_rows(batch["image_id"]), queue_id])
        excluded = batch["image_id"][:, None] == key_id[None]
        excluded[torch.arange(rows, device=device), own] = False

    def compare(queries: Tensor, in_batch: Tensor, in_queue: Tensor) -> Tensor:
        return torch.cat([queries @ in_batch.T, queries @ in_queue.T], dim=1) / temperature

    with torch.no_grad():
        teacher_i2t = compare(teacher.image_feature, batch_text, queue_text)
        teacher_t2i = compare(teacher.text_feature, batch_image, queue_image)
    return Similarities(
        image_to_text=compare(student.image_feature, batch_text, queue_text),
        text_to_image=compare(student.text_feature, batch_image, queue_image),
        teacher_image_to_text=teacher_i2t,
        teacher_text_to_image=teacher_t2i,
        own_columns=own,
        excluded=excluded,
    )


class ImageTextContrast(Objective):
    """Soft cross-entropy of both directions; the teacher's similarities are the soft part of the targets."""

    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Need no cross-modal pass."""
        return []

    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the mean of the two directions' mean soft cross-entropies."""
        s = features.similarities
        losses = []
        for logits, teacher in (
            (s.image_to_text, s.teacher_image_to_text),
            (s.text_to_image, s.teacher_text_to_image),
        ):
            targets = self.targets(teacher, s, alpha)
            if s.excluded is not None:
                logits = logits.masked_fill(s.excluded, EXCLUDED_LOGIT)
            losses.append(soft_target_cross_entropy(logits, targets))
        return (losses[0] + losses[1]) / 2

    @staticmethod
    def targets(teacher: Tensor, s: Similarities, alpha: float) -> Tensor:
        """Return (B, G + Q): alpha of the teacher's distribution, 1 - alpha on the own pair."""
        if s.excluded is not None:
            teacher = teacher.masked_fill(s.excluded, EXCLUDED_LOGIT)
        hard = torch.zeros_like(teacher).scatter_(1, s.own_columns[:, None], 1.0)
        return alpha * teacher.softmax(-1) + (1 - alpha) * hard

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Entropy of the teacher's distribution (nats), and how often the own pair is the most similar key."""
        s = features.similarities
        count = torch.tensor(float(s.own_columns.shape[0]), device=s.own_columns.device)
        log_p = s.teacher_image_to_text.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).sum()
        right = (s.image_to_text.argmax(-1) == s.own_columns).float().sum()
        return {"itc/target_entropy": torch.stack([entropy, count]), "itc/accuracy": torch.stack([right, count])}
