"""Fine-tuning for retrieval and grounding: pretraining's ITC and ITM, where every caption of a picture is right.

The evaluation is in simla_ds.downstream.retrieval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from simla_ds.config import ObjectivesConfig
from simla_ds.data.sample import clean_caption, stable_hash
from simla_ds.downstream.annotations import Annotations, Entry, wrong_text
from simla_ds.downstream.base import Downstream, TaskBatch
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.downstream.retrieval import DIRECTIONS, RECALL_AT, retrieve
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher


def retrieval_objectives(objectives: ObjectivesConfig) -> ObjectivesConfig:
    """Return pretraining's objectives with ITC over image ids and ITM alone."""
    others = (name for name in objectives.names if name not in ("itc", "itm"))
    off = {name: replace(getattr(objectives, name), weight=0.0) for name in others}
    return replace(objectives, **off, itc=replace(objectives.itc, positives="image"))


class Retrieval(Downstream):
    """The pretrained network itself; its trainer's module is a PretrainTask with two objectives.

    Entries: {"image": path, "caption": text or list of texts, "image_id": optional, else the path}.
    """

    name = "retrieval"
    network = Simla
    metric = "r_mean"
    whole = True

    def __init__(self, rerank: int = 16):
        """rerank: candidates of each query that ITM orders in an evaluation."""
        self.rerank = rerank

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """A picture's path and at least one caption."""
        yield from wrong_text(entry, "image")
        captions = _captions(entry)
        if not captions or not all(isinstance(caption, str) for caption in captions):
            yield "key 'caption' must hold a text or a list of texts"

    def rows(self, annotations: Annotations) -> Annotations:
        """Return an entry for each caption."""
        rows = [
            {"image": entry["image"], "caption": caption, "image_id": _identity(entry)}
            for entry in annotations.entries
            for caption in _captions(entry)
        ]
        return replace(annotations, entries=rows)

    def pictures(self, entry: Entry) -> list[str]:
        """Return its picture."""
        return [entry["image"]]

    def text(self, entry: Entry) -> str:
        """Return the caption, cleaned."""
        return clean_caption(entry["caption"], self.max_words)

    def fields(self, entry: Entry) -> dict[str, Any]:
        """Return a number that captions of one picture share."""
        return {"image_id": stable_hash(entry["image_id"])}

    def collate(self, fields: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `image_id` (B,) int64."""
        return {"image_id": torch.tensor([field["image_id"] for field in fields])}

    def module(self, model: Simla, teacher: Teacher, config: FinetuneConfig) -> nn.Module:
        """Return a PretrainTask of ITC and ITM."""
        config = replace(config, objectives=retrieval_objectives(config.objectives))
        return PretrainTask(model, teacher, FeatureQueue.start(config), config)

    def predictions(self, network: Simla, batches: Iterable[TaskBatch]) -> list[dict[str, Any]]:
        """Return the rank, 0 is best, of what each query looks for: first of all pictures, then of all captions.

        The entry of a picture is its first caption's.
        """
        captions: list[int] = []
        pictures: dict[int, int] = {}

        def noted() -> Iterator[TaskBatch]:
            for batch in batches:
                numbers = batch["number"].tolist()
                captions.extend(numbers)
                for image, number in zip(batch["image_id"].tolist(), numbers, strict=True):
                    pictures.setdefault(image, number)
                yield batch

        rankings = retrieve(network, noted(), rerank=self.rerank).rankings
        scored = "itm" if self.rerank else "itc"
        return [
            {"entry": entry, "direction": direction, "rank": rank}
            for direction, entries in zip(DIRECTIONS, (pictures.values(), captions), strict=True)
            for entry, rank in zip(entries, rankings[f"{scored}/{direction}"].rank.tolist(), strict=True)
        ]

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return recall at 1, 5 and 10 in percent under the published names, their means, and `r_mean` of those."""
        found: dict[str, float] = {}
        ranks: list[int] = []
        for direction, name in zip(DIRECTIONS, ("txt", "img"), strict=True):
            ranks = [p["rank"] for p in predictions if p["direction"] == direction]
            recall = {f"{name}_r{k}": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in RECALL_AT}
            found |= {**recall, f"{name}_r_mean": sum(recall.values()) / len(recall)}
        return {**found, "r_mean": (found["txt_r_mean"] + found["img_r_mean"]) / 2, "captions": len(ranks)}


def _identity(entry: Entry) -> str:
    """Return what captions of one picture share: 7 and "7" are one id, and null is none."""
    given = entry.get("image_id")
    return entry["image"] if given is None else str(given)


def _captions(entry: Entry) -> list[Any]:
    captions = entry.get("caption")
    return captions if isinstance(captions, list) else [captions]
