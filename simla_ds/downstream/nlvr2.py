"""A statement about two pictures: true or false?  (NLVR2; ALBEF section 5)

Layers read the two pictures in turn. Those of the pretrained stream's upper half come twice, once for either picture,
and such a pair shares the keys and values of its cross-attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from simla_ds.config import ModelConfig, StreamConfig
from simla_ds.downstream.annotations import Entry
from simla_ds.downstream.base import ClassHead, TaskBatch, TaskNetwork, copy_weights
from simla_ds.downstream.classification import Classification
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
        super().__init__(doubled, config.vocabulary, config.image_positions)
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


class Nlvr2(Classification):
    """Entries: {"images": [first, second], "sentence": text, "label": "True" or "False", "identifier": optional}."""

    name = "nlvr2"
    network = PairNetwork
    classes = ("False", "True")

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """Two pictures' names besides. A boolean label is refused: the published code would take it for False."""
        images = entry.get("images")
        if not (isinstance(images, list) and len(images) == 2 and all(isinstance(name, str) for name in images)):
            yield "key 'images' must hold the names of two pictures"
        yield from super().problems(entry, train=train)

    def pictures(self, entry: Entry) -> list[str]:
        """Return both."""
        return entry["images"]

    def identity(self, entry: Entry) -> Hashable | None:
        """Return the identifier, where there is one."""
        return entry.get("identifier")

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return accuracy and consistency: the share of statements that are right over all their pairs of pictures."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for said in predictions:
            entry = entries[said["entry"]]
            groups[statement(entry)].append(entry["label"] == said["label"])
        consistent = sum(all(right) for right in groups.values())
        return {**super().measures(entries, predictions), "consistency": 100 * consistent / len(groups)}


def statement(entry: Entry) -> str:
    """Return which statement an entry is about: SPLIT-SET-PAIR-SENTENCE without its pair, or else the sentence."""
    parts = str(entry.get("identifier", "")).split("-")
    return "-".join((*parts[:2], parts[3])) if len(parts) == 4 else entry["sentence"]
