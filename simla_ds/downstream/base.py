"""What a downstream task is: a network, a loss, a protocol. And the module that trains any of them.

B examples of this rank's micro-batch, L padded text length. Batches are plain dicts (see types.Batch) with `image`,
`input_ids`, `text_mask`, `token_index` and what the task's loss needs besides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ds.downstream.annotations import Annotations, Entry, check_annotations
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.model.network import Network
from simla_ds.model.stream import init_linear
from simla_ds.objectives import FeatureQueue
from simla_ds.objectives.soft_targets import soft_target_cross_entropy
from simla_ds.teacher import Teacher

TaskBatch = Mapping[str, Any]


class TaskNetwork(Network):
    """A downstream network, which takes its encoders from a pretrained model."""

    @abstractmethod
    def start_from(self, pretrained: Any) -> None:
        """Copy what the pretrained model (a Simla) has; heads of its own keep their start values."""


class Downstream(ABC):
    """One task: what its entries must hold, what is trained on them, its predictions and their measures."""

    name: ClassVar[str]
    network: ClassVar[type[Network]]
    """Of student and teacher."""
    metric: ClassVar[str]
    """The measure (higher is better) that picks the best weights."""
    max_words: ClassVar[int] = 30
    """Words of a text that are kept, as published."""
    whole = False
    """Whether an evaluation needs all entries at once, so that ranks cannot share it."""

    # entries

    @abstractmethod
    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """Say what is wrong with an entry; train: whether it is to be learnt from."""

    @abstractmethod
    def pictures(self, entry: Entry) -> list[str]:
        """Return the names of its pictures."""

    @abstractmethod
    def text(self, entry: Entry) -> str:
        """Return its cleaned text."""

    def said(self, entry: Entry) -> str:
        """Return all that is said of its pictures: they are not flipped where that has a left or a right."""
        return self.text(entry)

    @abstractmethod
    def fields(self, entry: Entry) -> dict[str, Any]:
        """Return what collate makes labels of, as plain values."""

    @abstractmethod
    def collate(self, fields: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the labels of a batch."""

    def identity(self, entry: Entry) -> Hashable | None:
        """Return what no two entries may share; None where there is no such thing."""
        return None

    def rows(self, annotations: Annotations) -> Annotations:
        """Return annotations with one entry per example."""
        return annotations

    def remarks(self, annotations: Annotations) -> list[str]:
        """Return what a person should know of a split, a line each."""
        return []

    def checked(self, annotations: Annotations, *, train: bool) -> Annotations:
        """Return the rows of annotations that hold what they must. Raises BadAnnotations with all problems."""
        check_annotations(annotations, self.pictures, partial(self.problems, train=train), self.identity)
        return self.rows(annotations)

    # training

    @abstractmethod
    def module(self, model: Any, teacher: Teacher, config: FinetuneConfig) -> nn.Module:
        """Return what the DeepSpeed engine wraps."""

    # evaluation

    @abstractmethod
    def predictions(self, network: Any, batches: Iterable[TaskBatch]) -> list[dict[str, Any]]:
        """Return what the network, in eval mode, says of all batches, as JSON values; `entry` is the entry's number."""

    @abstractmethod
    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the protocol's numbers."""


class SupervisedTask(Downstream):
    """A task with a label for each example: one loss, and a prediction for each example by itself."""

    @abstractmethod
    def loss(self, student: Any, teacher: Any, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the scalar loss; alpha is the weight of the teacher's targets."""

    @abstractmethod
    def predict(self, network: Any, batch: TaskBatch) -> list[dict[str, Any]]:
        """Return what the network says of each example of a batch, as JSON values; network is in eval mode."""

    def module(self, model: Any, teacher: Teacher, config: FinetuneConfig) -> nn.Module:
        """Return the student under this task's loss."""
        return FinetuneModule(self, model, teacher, config)

    def predictions(self, network: Any, batches: Iterable[TaskBatch]) -> list[dict[str, Any]]:
        """Return what the network says of all batches."""
        return predict_each(network, batches, self.predict)


@torch.no_grad()
def predict_each(
    network: Any, batches: Iterable[TaskBatch], predict: Callable[[Any, TaskBatch], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return what `predict` says of each batch, moved to the network's device, with `entry` from its `number`."""
    device, found = next(network.parameters()).device, []
    for batch in batches:
        said = predict(network, {name: value.to(device) for name, value in batch.items()})
        found += [{"entry": n, **answer} for n, answer in zip(batch["number"].tolist(), said, strict=True)]
    return found


class FinetuneModule(nn.Module):
    """Student, teacher and a task's loss, as the trainer asks for them (compare task.PretrainTask)."""

    counted = ()

    def __init__(self, downstream: SupervisedTask, model: Network, teacher: Teacher, config: FinetuneConfig):
        super().__init__()
        self.downstream, self.model, self.config = downstream, model, config
        self.queue = FeatureQueue(0, model.config.projection_size)
        self._teacher = [teacher]  # in a list, so that it is not registered as a submodule

    @property
    def teacher(self) -> Teacher:
        """The momentum teacher."""
        return self._teacher[0]

    def forward(self, batch: TaskBatch, *, alpha: float, step: int = 0, keep: bool = False) -> dict[str, Any]:
        """Run one micro-batch. Returns `loss`, a scalar with gradient, and `losses` and `monitor` for the log."""
        loss = self.downstream.loss(self.model, self.teacher.module, batch, alpha)
        return {"loss": loss, "losses": {self.downstream.name: loss.detach()}, "monitor": {}}


class ClassHead(nn.Sequential):
    """Two linear layers around a ReLU: (B, D) fused [CLS] to (B, classes)."""

    def __init__(self, width: int, classes: int):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
        self.apply(lambda module: init_linear(module, width))


def distilled_class_loss(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) CE(labels) + alpha CE(teacher's distribution), means over B.

    student, teacher: (B, C) logits. labels: (B,) int64.
    """
    student, targets = student.float(), teacher.float().softmax(-1)
    hard = F.cross_entropy(student, labels)
    return (1 - alpha) * hard + alpha * soft_target_cross_entropy(student, targets)


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy all parameters of a module of the same make."""
    with torch.no_grad():
        target.load_state_dict(source.state_dict(), strict=True)
