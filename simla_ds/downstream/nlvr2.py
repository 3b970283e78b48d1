"""A statement about two pictures: true or false?  (NLVR2; ALBEF section 5)

Layers read the two pictures in turn. Those of the pretrained stream's upper half come twice, once for either picture,
and such a pair shares the keys and values of its cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from simla_ds.config import ModelConfig, StreamConfig
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
from simla_ds.model.stream import Attention, Context, Stream, StreamLayer
from simla_ds.model.vision import ImageEncoder


def sources(config: StreamConfig) -> list[int]:
    """Return, for each layer of the two-picture stream, the layer of the pretrained stream that it starts from."""
    single = config.depth // 2 if config.shared else config.text_layers
    return [*range(single), *(layer for layer in range(single, config.depth) for _ in range(2))]


class PairStream(Stream):
    """A stream whose layer i reads picture i mod 2."""

    def __init__(self, config: ModelConfig):
        stream = config.stream
        depth = len(sources(stream))
        doubled = (
            replace(stream, layers=depth)
            if stream.shared
            else replace(stream, fusion_layers=depth - stream.text_layers)
        )
        super().__init__(doubled, config.vocabulary, config.vision.patches)
        single = 2 * stream.depth - depth
        for first in range(single, depth, 2):
            one, other = self.cross_attention(first), self.cross_attention(first + 1)
            other.key, other.value = one.key, one.value

    def cross_attention(self, number: int) -> Attention:
        """Return a layer's cross-attention. ValueError where it has none."""
        layer = self.layers[number]
        if not isinstance(layer, StreamLayer) or layer.cross_attention is None:
            raise ValueError(f"layer {number} has no cross-attention")
        return layer.cross_attention

    def first_rows(self, x: Tensor, rows: Rows, pictures: Sequence[Context]) -> Tensor:
        """Run packed tokens (T, D) through all layers; return the first of each row, (R, D)."""
        layers = self._layers(fused=True)
        for number, layer in enumerate(layers):
            read = rows.first(x.device) if number == len(layers) - 1 else None
            x = self._run(layer, x, rows, pictures[number % 2], read)
        return x


class PairNetwork(TaskNetwork):
    """Text over two pictures, two classes from [CLS]."""

    task = "nlvr2"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.image_encoder = ImageEncoder(config.vision)
        self.stream = PairStream(config)
        self.head = ClassHead(config.stream.width, 2)

    def start_from(self, pretrained: Simla) -> None:
        """Take the image encoder, the embeddings and each layer's counterpart (see `sources`)."""
        copy_weights(self.image_encoder, pretrained.image_encoder)
        copy_weights(self.stream.embeddings, pretrained.stream.embeddings)
        for layer, number in zip(self.stream.layers, sources(self.config.stream), strict=True):
            copy_weights(layer, pretrained.stream.layers[number])

    def forward(self, batch: TaskBatch) -> Tensor:
        """Return logits (B, 2) of `image` (2B, 3, S, S), first pictures first, and `input_ids`, `text_mask` (B, L)."""
        image = self.image_encoder(batch["image"])
        pictures = [Context(half.flatten(0, 1), Rows.dense(half)) for half in image.chunk(2)]
        rows = Rows.of(batch["text_mask"], batch["token_index"])
        x = self.stream.embeddings(rows.pack(batch["input_ids"]), rows.positions(image.device))
        return self.head(self.stream.first_rows(x, rows, pictures))


class Nlvr2(Downstream):
    """Two-way classification, distilled from the momentum teacher."""

    name = "nlvr2"
    network = PairNetwork
    metric = "accuracy"

    def loss(self, student: PairNetwork, teacher: PairNetwork, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the distilled cross-entropy of `label` (B,), 1 for true."""
        with torch.no_grad():
            targets = teacher(batch)
        return distilled_class_loss(student(batch), targets, batch["label"], alpha)
