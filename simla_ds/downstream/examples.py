"""From a task's entries to batches: pictures transformed, texts tokenised, labels collated by the task.

The order, the workers and the resumable position are those of pretraining (data.loader.StreamLoader); held-out
entries come as they are listed, read ahead by as many workers.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from simla_ds.config import DataConfig
from simla_ds.data.loader import CHUNK, StreamLoader, read_ahead, stalled_data
from simla_ds.data.order import EpochOrder, Order, sample_generator
from simla_ds.data.sample import Reason, SkipSample, open_picture, picture_bytes, stable_hash
from simla_ds.data.text import TextTokenizer
from simla_ds.data.transforms import make_transform, normalise
from simla_ds.downstream.annotations import Annotations
from simla_ds.downstream.base import Downstream
from simla_ds.downstream.config import FinetuneConfig

SAMPLED = 1000
"""Entries, evenly spread, that a fingerprint is made of."""


@dataclass
class Example:
    """One entry, ready to be collated."""

    number: int
    """Its place in the annotations."""
    images: Tensor
    """(pictures, 3, S, S) uint8."""
    input_ids: list[int]
    draws: np.ndarray
    """(3,) from 0 to 1, for whatever a task draws: another epoch's are others."""
    fields: dict[str, Any]
    """What the task's loss or evaluation needs."""


@dataclass
class Examples:
    """What a worker hands over."""

    results: list[tuple[int, Example | Reason]]
    retried: int = 0
    """Fetches tried again, as loader.Chunk counts them: annotated pictures are local files."""

    def unpack(self) -> Iterator[tuple[int, Example | Reason]]:
        """Yield (global index, example or why it was skipped)."""
        return iter(self.results)


class ExampleMaker:
    """Turns an entry into an Example."""

    def __init__(self, config: FinetuneConfig, downstream: Downstream, tokenizer: TextTokenizer, *, train: bool):
        self.downstream, self.tokenizer, self.inputs = downstream, tokenizer, config.inputs
        self.transform = make_transform(config, 0, train=train)

    def make(self, annotations: Annotations, number: int, rng: np.random.Generator) -> Example:
        """Read and transform one entry. Raises SkipSample."""
        entry = annotations.entries[number]
        text, said, views = self.downstream.text(entry), self.downstream.said(entry), []
        for name in self.downstream.pictures(entry):
            try:
                picture = open_picture(picture_bytes(annotations.pictures.members(name)))
            except OSError:
                raise SkipSample("picture unreadable") from None
            views.append(torch.from_numpy(self.transform(picture, said, rng)[0]))
        ids, _ = self.tokenizer.encode("" if self.inputs == "image" else text)
        return Example(number, torch.stack(views), ids, rng.random(3), self.downstream.fields(entry))

    def collate(self, examples: Sequence[Example], pad_to: int = 0) -> dict[str, Tensor]:
        """Stack examples: `image` has all first pictures, then all second ones; `number` (B,) are their entries.

        `draws` is (B, 3). Texts are padded to the longest, at least to pad_to.
        """
        pad = self.tokenizer.vocabulary.pad
        ids = pad_sequence([torch.tensor(e.input_ids) for e in examples], batch_first=True, padding_value=pad)
        ids = F.pad(ids, (0, max(0, pad_to - ids.shape[1])), value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(e.input_ids) for e in examples])[:, None]
        image = normalise(torch.stack([e.images for e in examples]).transpose(0, 1).flatten(0, 1))
        return {
            "image": torch.zeros_like(image) if self.inputs == "text" else image,
            "input_ids": ids,
            "text_mask": mask,
            "token_index": mask.view(-1).nonzero()[:, 0],
            "number": torch.tensor([e.number for e in examples]),
            "draws": torch.from_numpy(np.stack([e.draws for e in examples])).float(),
            **self.downstream.collate([e.fields for e in examples]),
        }


class ExampleDataset(Dataset):
    """Examples by global index, over all epochs."""

    def __init__(self, annotations: Annotations, maker: ExampleMaker, order: Order, seed: int):
        self.annotations, self.maker, self.order, self.seed = annotations, maker, order, seed

    def __getitems__(self, global_indices: list[int]) -> Examples:
        """Make several, as a worker does."""
        results: list[tuple[int, Example | Reason]] = []
        for index in global_indices:
            _, number = self.order.locate(index)
            try:
                example = self.maker.make(self.annotations, number, sample_generator(self.seed, index))
            except SkipSample as skip:
                results.append((index, skip.reason))
            else:
                results.append((index, example))
        return Examples(results)


class ExampleLoader(StreamLoader):
    """Training batches of a task."""

    def __init__(
        self, config: FinetuneConfig, annotations: Annotations, maker: ExampleMaker, rank: int = 0, world_size: int = 1
    ):
        order = EpochOrder([len(annotations.entries)], config.data.shuffle_window, config.train.seed)
        self.maker = maker
        dataset = ExampleDataset(annotations, maker, order, config.train.seed)
        super().__init__(config, dataset, len(order), rank, world_size)
        every = max(1, len(order) // SAMPLED)
        sampled = "\n".join(json.dumps(entry, sort_keys=True) for entry in annotations.entries[::every])
        self.fingerprint = f"{len(order)} examples, {stable_hash(sampled):x}"

    def collate(self, items: list[Example]) -> dict[str, Tensor]:
        """Make a batch. Texts that are exchanged between ranks must be of one length."""
        shared = self.world_size > 1 and self.config.objectives.itm.negatives == "global"
        batch = self.maker.collate(items, pad_to=self.config.data.max_tokens if shared else 0)
        return {**batch, "itm_draws": batch["draws"][:, :2]}


class _AsListed:
    """The order in which entries are written."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def locate(self, global_index: int) -> tuple[int, int]:
        return 0, global_index


def held_out_batches(
    annotations: Annotations,
    maker: ExampleMaker,
    batch_size: int,
    data: DataConfig,
    *,
    limit: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Yield the entries rank, rank + world_size, ... in order; of at most `limit` (0: all).

    data.workers processes read ahead. Raises ValueError naming a picture that cannot be read, since a measure over
    fewer entries than said would mislead; StalledData when a process says nothing for data.timeout seconds.
    """
    count = min(limit or len(annotations.entries), len(annotations.entries))
    dataset = ExampleDataset(annotations, maker, _AsListed(count), seed=0)
    numbers = range(rank, count, world_size)
    chunks = [list(numbers[start : start + CHUNK]) for start in range(0, len(numbers), CHUNK)]
    ending = multiprocessing.Event()
    atexit.register(ending.set)
    loaded, examples = iter(read_ahead(dataset, chunks, data, batch_size, ending)), []
    try:
        while True:
            with stalled_data(annotations.source, data):
                chunk = next(loaded, None)
            if chunk is None:
                break
            for number, result in chunk.unpack():
                if isinstance(result, str):  # a Reason is
                    raise ValueError(f"{annotations.source}: entry {number} cannot be used: {result}")
                examples.append(result)
                if len(examples) == batch_size:
                    yield maker.collate(examples)
                    examples = []
        if examples:
            yield maker.collate(examples)
    finally:
        ending.set()
        atexit.unregister(ending.set)
