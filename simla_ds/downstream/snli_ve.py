"""Visual entailment: does the picture contradict, leave open or entail a sentence?  (SNLI-VE; ALBEF section 5)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from simla_ds.config import ModelConfig
from simla_ds.downstream.annotations import Entry, wrong_text
from simla_ds.downstream.base import ClassHead, TaskBatch, TaskNetwork, copy_weights
from simla_ds.downstream.classification import Classification
from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Context, Stream
from simla_ds.model.vision import ImageEncoder

CLASSES = ("contradiction", "neutral", "entailment")


class EntailmentNetwork(TaskNetwork):
    """Text over picture, three classes from [CLS]."""

    task = "snli_ve"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.image_encoder = ImageEncoder(config.vision)
        self.stream = Stream(config.stream, config.vocabulary, config.image_positions)
        self.head = ClassHead(config.stream.width, len(CLASSES))

    def start_from(self, pretrained: Simla) -> None:
        """Take both encoders."""
        copy_weights(self.image_encoder, pretrained.image_encoder)
        copy_weights(self.stream, pretrained.stream)

    def forward(self, batch: TaskBatch) -> Tensor:
        """Return logits (B, 3) of `image` (B, 3, S, S) and `input_ids`, `text_mask` (B, L), `token_index` (T,)."""
        image = self.image_encoder(batch["image"])
        rows = Rows.of(batch["text_mask"], batch["token_index"])
        context = Context(image.flatten(0, 1), Rows.dense(image))
        x = self.stream.embeddings(rows.pack(batch["input_ids"]), rows.positions(image.device))
        x = self.stream.body(x, rows, context)
        return self.head(self.stream.last(x, rows, context, read=rows.first(image.device)))


class SnliVe(Classification):
    """Entries: {"image": name (".jpg" is added to one without a suffix), "sentence": text, "label": one of CLASSES}."""

    name = "snli_ve"
    network = EntailmentNetwork
    classes = CLASSES

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """A picture's name besides."""
        yield from wrong_text(entry, "image")
        yield from super().problems(entry, train=train)

    def pictures(self, entry: Entry) -> list[str]:
        """Return its picture; the published files name Flickr30k's by their numbers alone."""
        return [entry["image"] if Path(entry["image"]).suffix else f"{entry['image']}.jpg"]

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return accuracy, and `confusion/TRUE/SAID`: how many entries of either class were said to be of each."""
        found = super().measures(entries, predictions)
        for wanted in CLASSES:
            said = [p["label"] for p in predictions if entries[p["entry"]]["label"] == wanted]
            found.update({f"confusion/{wanted}/{label}": said.count(label) for label in CLASSES})
        return found
