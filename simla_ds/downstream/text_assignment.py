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
from simla_ds.data.order import sample_generator
from simla_ds.downstream.annotations import Annotations, Entry
from simla_ds.downstream.base import SupervisedTask, TaskBatch, copy_weights
from simla_ds.downstream.nlvr2 import PairNetwork
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.model.simla import Simla
from simla_ds.model.stream import init_linear

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

    def assigned(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Return logits (B, 3) and labels (B,) of `image` (B, 3, S, S) and its captions; B is 2 at least."""
        image = self.image_encoder(batch["image"])
        with torch.no_grad():
            feature = F.normalize(self.image_projection(image[:, 0]).float(), dim=-1)
        first, second, label = assign(feature, batch["number"])
        logits = self.head(self.fused(batch, image.index_select(0, first), image.index_select(0, second)))
        return logits.float(), label


def assign(feature: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw two pictures for each caption, by features (B, E) and the numbers of the entries (B,).

    The same batch has the same draws; in another epoch's batch a caption has another label. With chance 2/3 the
    caption's own picture and one drawn by similarity, in either order (labels 0, 1: where its own stands); else two
    others, drawn likewise (label 2). Returns the pictures' places in the batch and the labels, (B,) int64.
    """
    seed = int(number.sum())
    draws = torch.tensor([sample_generator(seed, entry).random(3).tolist() for entry in number.tolist()]).to(feature)
    likely = (feature @ feature.T / TEMPERATURE).softmax(-1).fill_diagonal_(0.0)
    other = _drawn(likely, draws[:, 0])
    another = _drawn(likely.scatter(1, other[:, None], 0.0), draws[:, 1]) if len(feature) > 2 else other
    label = (3 * draws[:, 2]).long()
    own = torch.arange(len(feature), device=feature.device)
    first = torch.where(label == 0, own, other)
    second = torch.where(label == 0, other, torch.where(label == 1, own, another))
    return first, second, label


def _drawn(weights: Tensor, draws: Tensor) -> Tensor:
    """Return a column of each row of (B, B) weights, by numbers (B,) from 0 to 1."""
    below = weights.cumsum(1)
    return torch.searchsorted(below, (draws * below[:, -1])[:, None], right=True)[:, 0].clamp(max=len(weights) - 1)


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
        """Return nothing: labels are drawn with the pictures."""
        return {}

    def collate(self, fields: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def loss(self, student: AssignmentNetwork, teacher: AssignmentNetwork, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the mean cross-entropy; there are no soft targets."""
        return F.cross_entropy(*student.assigned(batch))

    def predict(self, network: AssignmentNetwork, batch: TaskBatch) -> list[dict[str, Any]]:
        """Return the likeliest class and the drawn one."""
        logits, labels = network.assigned(batch)
        said = zip(logits.argmax(-1).tolist(), labels.tolist(), strict=True)
        return [{"label": label, "drawn": drawn} for label, drawn in said]

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the accuracy in percent; a guess has 33.3."""
        right = sum(said["label"] == said["drawn"] for said in predictions)
        return {"accuracy": 100 * right / len(predictions), "captions": len(predictions)}
