"""What NLVR2 and SNLI-VE share: a label per entry, a class per prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from simla_ds.data.sample import clean_caption
from simla_ds.downstream.annotations import Annotations, Entry, wrong_text
from simla_ds.downstream.base import SupervisedTask, TaskBatch, distilled_class_loss


class Classification(SupervisedTask):
    """Classes from [CLS], distilled from the momentum teacher (ALBEF section 5)."""

    classes: ClassVar[tuple[str, ...]]
    """Names as in `label`, in the order of the logits."""
    metric = "accuracy"

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """A sentence, and a label that is one of the classes."""
        yield from wrong_text(entry, "sentence", "label")
        if isinstance(entry.get("label"), str) and entry["label"] not in self.classes:
            yield f"label {entry['label']!r} is none of {', '.join(self.classes)}"

    def text(self, entry: Entry) -> str:
        """Return the sentence, cleaned as captions are."""
        return clean_caption(entry["sentence"], self.max_words)

    def fields(self, entry: Entry) -> dict[str, Any]:
        """Return the class's number."""
        return {"label": self.classes.index(entry["label"])}

    def collate(self, fields: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `label` (B,) int64."""
        return {"label": torch.tensor([field["label"] for field in fields])}

    def remarks(self, annotations: Annotations) -> list[str]:
        """Say when there is one class only."""
        labels = {entry["label"] for entry in annotations.entries}
        only = f"{annotations.source}: all {len(annotations.entries)} entries have the label {next(iter(labels))!r}"
        return [only] if len(labels) == 1 else []

    def loss(self, student: Any, teacher: Any, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the distilled cross-entropy of `label` (B,)."""
        logits = student(batch)
        with torch.no_grad():
            targets = teacher(batch) if alpha else logits
        return distilled_class_loss(logits, targets, batch["label"], alpha)

    def predict(self, network: Any, batch: TaskBatch) -> list[dict[str, Any]]:
        """Return the likeliest class and the probabilities of all."""
        rows = network(batch).float().softmax(-1).tolist()
        return [{"label": self.classes[row.index(max(row))], "probability": row} for row in rows]

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return accuracy in percent, and beside it that of always giving the commonest label of these entries."""
        wanted = [entries[prediction["entry"]]["label"] for prediction in predictions]
        right = sum(label == said["label"] for label, said in zip(wanted, predictions, strict=True))
        majority = max(Counter(wanted).values())
        count = len(predictions)
        return {"accuracy": 100 * right / count, "majority": 100 * majority / count, "entries": count}
