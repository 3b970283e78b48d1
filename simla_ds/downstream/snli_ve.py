"""Visual entailment: does the picture contradict, leave open or entail a sentence?  (SNLI-VE; ALBEF section 5)"""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ds.config import ModelConfig
from simla_ds.downstream.base import (
    ClassHead,
    Downstream,
    TaskBatch,
    TaskNetwork,
    copy_weights,
    distilled_class_loss,
)
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
        self.stream = Stream(config.stream, config.vocabulary, config.vision.patches)
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


class SnliVe(Downstream):
    """Three-way classification, distilled from the momentum teacher."""

    name = "snli_ve"
    network = EntailmentNetwork
    metric = "accuracy"

    def loss(self, student: EntailmentNetwork, teacher: EntailmentNetwork, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the distilled cross-entropy of `label` (B,)."""
        with torch.no_grad():
            targets = teacher(batch)
        return distilled_class_loss(student(batch), targets, batch["label"], alpha)
