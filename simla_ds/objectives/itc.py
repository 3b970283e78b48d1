"""Image-text contrast: does a picture lie nearer to its own caption than to others?  (SIMLA section 3.3, as ALBEF)

B pairs, G keys of the batch (all ranks when corrected, this rank's when official), Q filled queue rows, E width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from simla_ds.objectives.base import Objective
from simla_ds.objectives.collectives import gather_by_rank, rank
from simla_ds.objectives.feature_queue import FeatureQueue
from simla_ds.objectives.soft_targets import soft_target_cross_entropy
from simla_ds.types import Batch, ContrastKeys, Features, Outputs, Request, StepFeatures
from simla_kernels import contrastive_loss


def contrast_keys(
    teacher: Features,
    batch: Batch,
    temperature: Tensor,
    queue: FeatureQueue,
    *,
    official: bool,
    alone: bool = False,
    positives: Literal["pair", "image"] = "pair",
) -> ContrastKeys:
    """Collect the teacher's features that the student's are compared with; temperature is (1,) float32.

    alone: this rank's only, where every rank has the same batch (evaluation). positives: as itc.positives.
    """
    with_ids = positives == "image" or not official
    image, text, ids = teacher.image_feature, teacher.text_feature, batch["image_id"]
    count, first = image.shape[0], 0
    queue_image, queue_text, queue_id = queue.keys()
    if not (official or alone):
        image, text, ids = gather_by_rank(image), gather_by_rank(text), gather_by_rank(ids)
        first = rank() * count
    return ContrastKeys(
        image=image,
        text=text,
        image_id=ids if with_ids else None,
        queue_image=queue_image,
        queue_text=queue_text,
        queue_id=queue_id if with_ids else None,
        first=first,
        temperature=temperature,
    )


def similarities(features: Features, keys: ContrastKeys) -> tuple[Tensor, Tensor]:
    """Return a network's cosines over temperature, image to text and text to image, (B, G + Q) float32 each.

    The whole matrices, for people and proofs: the loss is computed without them.
    """
    texts, images = torch.cat([keys.text, keys.queue_text]), torch.cat([keys.image, keys.queue_image])
    return (
        features.image_feature @ texts.T / keys.temperature,
        features.text_feature @ images.T / keys.temperature,
    )


def image_similarities(features: Features, keys: ContrastKeys) -> Tensor:
    """Return the first of `similarities` alone, reading the queue in place: for measures of every step."""
    parts = [features.image_feature @ texts.T for texts in (keys.text, keys.queue_text)]
    return torch.cat(parts, dim=1) / keys.temperature


def excluded_keys(batch: Batch, keys: ContrastKeys, positives: Literal["pair", "image"]) -> Tensor:
    """Return (B, G + Q) bool: keys that the loss leaves out of a pair's softmax, because they are of its own picture.

    The pair's own key stays in. None is left out as published, without ids, and where they are positives too.
    """
    rows, count = len(batch["image_id"]), len(keys.image) + len(keys.queue_image)
    columns = torch.arange(count, device=keys.image.device)
    own = columns == (torch.arange(rows, device=keys.image.device) + keys.first)[:, None]
    if positives == "image" or keys.image_id is None or keys.queue_id is None:
        return torch.zeros_like(own)
    ids = torch.cat([keys.image_id, keys.queue_id])
    return ((batch["image_id"][:, None] == ids) | (ids < 0)) & ~own  # < 0: not filled yet


def entropy(similarity: Tensor, excluded: Tensor) -> Tensor:
    """Return the entropy (nats) of each row's softmax over the keys that are not excluded, (B, K) twice -> (B,)."""
    return torch.special.entr(similarity.masked_fill(excluded, float("-inf")).softmax(-1)).sum(-1)


class ImageTextContrast(Objective):
    """Soft cross-entropy of both directions; the teacher's similarities are the soft part of the targets."""

    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Need no cross-modal pass."""
        return []

    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the mean of the two directions' mean soft cross-entropies."""
        student, keys = features.student, features.keys
        if self.config.itc.positives == "image":
            return self._loss_by_image(batch, features, alpha)
        loss, *_ = contrastive_loss(
            student.image_feature,
            student.text_feature,
            keys.image,
            keys.text,
            keys.queue_image,
            keys.queue_text,
            keys.temperature,
            alpha,
            keys.image_id,
            keys.queue_id,
            keys.first,
        )
        return loss

    def _loss_by_image(self, batch: Batch, features: StepFeatures, alpha: float) -> Tensor:
        """The same with all captions of a picture right, evenly: the fused contrast knows one positive a row.

        Fine-tuning's batches are small enough to make the (B, G + Q) matrices.
        """
        keys = features.keys
        if keys.image_id is None or keys.queue_id is None:
            raise ValueError("itc.positives=image needs the keys' ids")
        right = (batch["image_id"][:, None] == torch.cat([keys.image_id, keys.queue_id])[None]).float()
        hard = right / right.sum(1, keepdim=True)
        with torch.no_grad():
            teacher = similarities(features.teacher, keys)
        return sum(
            soft_target_cross_entropy(mine, alpha * theirs.softmax(-1) + (1 - alpha) * hard) / 2
            for mine, theirs in zip(similarities(features.student, keys), teacher, strict=True)
        )  # pyright: ignore[reportReturnType]  a sum of tensors is one

    @torch.no_grad()
    def row_losses(
        self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One row per pair: the mean of its two directions."""
        keys = features.keys
        if keys.image_id is None or keys.queue_id is None:
            raise ValueError("losses of single pairs need the keys' ids (objectives.fidelity corrected)")
        excluded = excluded_keys(batch, keys, self.config.itc.positives)
        pairs = torch.arange(len(excluded), device=excluded.device)
        own = torch.arange(excluded.shape[1], device=excluded.device) == (pairs + keys.first)[:, None]
        losses = torch.zeros(len(pairs), device=excluded.device)
        of_student, of_teacher = similarities(features.student, keys), similarities(features.teacher, keys)
        for mine, theirs in zip(of_student, of_teacher, strict=True):
            soft = theirs.masked_fill(excluded, float("-inf")).softmax(-1)
            log_p = mine.masked_fill(excluded, float("-inf")).log_softmax(-1).masked_fill(excluded, 0.0)
            losses -= ((alpha * soft + (1 - alpha) * own) * log_p).sum(-1) / 2
        return losses, torch.ones_like(losses), pairs

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Entropy of the teacher's distribution (nats), and how often the own pair is the most similar key.

        Both among the keys that the loss compares.
        """
        similarity, _ = similarities(features.student, features.keys)
        of_teacher, _ = similarities(features.teacher, features.keys)
        excluded = excluded_keys(batch, features.keys, self.config.itc.positives)
        similarity = similarity.masked_fill(excluded, float("-inf"))
        rows = torch.arange(similarity.shape[0], device=similarity.device)
        right = (similarity.argmax(-1) == rows + features.keys.first).float()
        count = torch.tensor(float(len(rows)), device=similarity.device)
        return {
            "itc/target_entropy": torch.stack([entropy(of_teacher, excluded).sum(), count]),
            "itc/accuracy": torch.stack([right.sum(), count]),
        }
