"""Text assignment: which of two pictures does a caption describe, the first, the second or neither?  (ALBEF section 5)

The step between pretraining and NLVR2, on pretraining's captions: it teaches the doubled layers to read two pictures.
`--task text_assignment --model PRETRAINED`, then `--task nlvr2 --model` its best/ or final/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ds.config import ModelConfig
from simla_ds.downstream.annotations import Annotations, Entry
from simla_ds.downstream.base import SupervisedTask, TaskBatch, copy_weights
from simla_ds.downstream.nlvr2 import PairNetwork
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.model.simla import Simla
from simla_ds.model.stream import init_linear
from simla_ds.objectives.itm import draw_columns

TEMPERATURE = 0.07
"""Of the similarities that other pictures are drawn by."""


class AssignmentNetwork(PairNetwork):
    """NLVR2's network with three classes, and pretraining's projection of pictures, which is not trained."""

    task = "text_assignment"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.head = nn.Linear(config.stream.width, 3)
        init_linear(self.head, config.stream.width)
        self.image_projection = nn.Linear(config.stream.width, config.projection_size)

    def start_from(self, pretrained: Simla | PairNetwork) -> None:
        """Take what NLVR2 takes, and the projection."""
        super().start_from(pretrained)
        if isinstance(pretrained, (Simla, AssignmentNetwork)):
            copy_weights(self.image_projection, pretrained.image_projection)

    def assigned(self, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, 3), labels (B,) and which captions count (B,) bool, of `image` (B, 3, S, S)."""
        image = self.image_encoder(batch["image"])
        with torch.no_grad():
            feature = F.normalize(self.image_projection(image[:, 0]).float(), dim=-1)
        first, second, label, counts = assign(feature, batch["image_id"], batch["draws"])
        logits = self.head(self.fused(batch, image.index_select(0, first), image.index_select(0, second)))
        return logits.float(), label, counts


def assign(feature: Tensor, image_id: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw two pictures for each caption, by features (B, E), image_id (B,) and three numbers from 0 to 1 each (B, 3).

    With chance 2/3 the caption's own picture and one drawn by similarity, in either order (labels 0, 1: where its own
    stands); else two others, drawn likewise (label 2), or one of them twice where there is no second. Captions of one
    picture are never each other's other picture. Returns the pictures' places in the batch, the labels, (B,) int64
    each, and (B,) bool: captions for which the batch has another picture. The rest count for nothing.
    """
    likely = (feature @ feature.T / TEMPERATURE).softmax(-1)
    allowed = image_id[:, None] != image_id[None]
    other = draw_columns(likely, allowed, draws[:, 0])
    further = allowed & (image_id[other][:, None] != image_id[None])
    another = torch.where(further.any(1), draw_columns(likely, further, draws[:, 1]), other)
    label = (3 * draws[:, 2]).long().clamp(max=2)  # float32 rounds what is nearly 1 up to it
    own = torch.arange(len(feature), device=feature.device)
    first = torch.where(label == 0, own, other)
    second = torch.where(label == 0, other, torch.where(label == 1, own, another))
    return first, second, label, allowed.any(1)


class TextAssignment(SupervisedTask):
    """Entries as retrieval's: {"image": path, "caption": text or list of texts}."""

    name = "text_assignment"
    network = AssignmentNetwork
    metric = "accuracy"

    def __init__(self):
        self.captions = Retrieval()

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """As retrieval's."""
        return self.captions.problems(entry, train=train)

    def rows(self, annotations: Annotations) -> Annotations:
        """Return an entry for each caption."""
        return self.captions.rows(annotations)

    def pictures(self, entry: Entry) -> list[str]:
        """Return its picture."""
        return self.captions.pictures(entry)

    def text(self, entry: Entry) -> str:
        """Return the caption, cleaned."""
        return self.captions.text(entry)

    def fields(self, entry: Entry) -> dict[str, Any]:
        """Return its picture's number: labels are drawn with the pictures."""
        return self.captions.fields(entry)

    def collate(self, fields: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `image_id` (B,) int64."""
        return self.captions.collate(fields)

    def loss(self, student: AssignmentNetwork, teacher: AssignmentNetwork, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the mean cross-entropy over captions that count, 0 without any; there are no soft targets."""
        logits, label, counts = student.assigned(batch)
        losses = F.cross_entropy(logits, label, reduction="none")
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    def predict(self, network: AssignmentNetwork, batch: TaskBatch) -> list[dict[str, Any]]:
        """Return the likeliest class and the drawn one; None for a caption that does not count."""
        logits, labels, counts = network.assigned(batch)
        said = zip(logits.argmax(-1).tolist(), labels.tolist(), counts.tolist(), strict=True)
        return [{"label": label, "drawn": drawn if counted else None} for label, drawn, counted in said]

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the accuracy in percent over captions that count; a guess has 33.3.

        Raises ValueError when none does.
        """
        counted = [said for said in predictions if said["drawn"] is not None]
        if not counted:
            raise ValueError(
                f"{len(predictions)} held-out captions: no batch has two pictures; hold out captions of more pictures "
                "or raise train.batch_size"
            )
        right = sum(said["label"] == said["drawn"] for said in counted)
        return {"accuracy": 100 * right / len(counted), "captions": len(counted)}
