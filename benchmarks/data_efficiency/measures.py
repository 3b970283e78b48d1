"""What is measured of a trained model, zero-shot: nothing is fitted, nothing chosen, on scenes never seen.

Retrieval both ways; grounding; keywords; swap probes. A set that trains no matching head has no ITM and no grounding;
ITC's measures are there for all. Beside each measure stands what chance gets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simla_ds.config import Config, DataConfig
from simla_ds.data.loader import eval_batches
from simla_ds.data.scenes.kit import kit
from simla_ds.data.shards import ShardFiles, find_shards, open_shard
from simla_ds.data.text import TextTokenizer
from simla_ds.downstream.config import FinetuneConfig, FinetuneData
from simla_ds.downstream.examples import ExampleMaker, held_out_batches
from simla_ds.downstream.grounding import Grounding
from simla_ds.downstream.probes import load_probes, score_probes
from simla_ds.downstream.probes import measures as probe_measures
from simla_ds.downstream.retrieval import DIRECTIONS, RECALL_AT, retrieve
from simla_ds.downstream.scenes import scene_annotations
from simla_ds.hub import SimlaProcessor, load_model_folder
from simla_ds.model.simla import Simla
from simla_ds.objectives.psl import average_precision
from simla_ds.types import Batch

Numbers = dict[str, float]
_GROUNDING = ("pointing", "proposal_iou50", "centre", "random", "proposal_random", "expressions")
"""What is kept of grounding's measures; proposal_iou50 is its accuracy: the right one of the scene's boxes."""
SWAPPED = ("attribute", "noun", "relation")
"""What captions of probes are made false by."""


@dataclass(frozen=True)
class Subject:
    """A model under test and what it was trained for."""

    model: Simla
    tokenizer: TextTokenizer
    config: Config
    """Its network and how its data are read."""
    objectives: tuple[str, ...]


def measure(
    folder: Path, objectives: tuple[str, ...], splits: Mapping[str, str], *, pictures: int, rerank: int
) -> Numbers:
    """Measure a model folder; names are SPLIT/KIND/...

    Args:
        folder: as pretraining writes it.
        objectives: those that trained it.
        splits: shards by the name of their split.
        pictures: the first so many of each split.
        rerank: candidates that ITM orders.
    """
    model, config = load_model_folder(folder)
    processor = SimlaProcessor.from_pretrained(folder)
    data = DataConfig(max_words=processor.max_words, max_tokens=processor.tokenizer.max_tokens)
    subject = Subject(model, processor.tokenizer, Config(model=config, data=data), objectives)
    numbers: Numbers = {}
    for split, shards in splits.items():
        loaded = list(eval_batches(subject.config, shards, subject.tokenizer, 0, limit=pictures))
        batches = [batch for batch, _ in loaded]
        kinds = {"retrieval": retrieval(subject, batches, rerank)}
        if scenes := scene_records(shards, pictures):
            kinds["keywords"] = keywords(subject, batches, scenes)
            kinds["swaps"] = swaps(subject, processor, shards, pictures)
            if "itm" in objectives:
                kinds["grounding"] = grounding(subject, shards, pictures)
        numbers |= {f"{split}/{kind}/{name}": value for kind, of in kinds.items() for name, value in of.items()}
    return {name: round(value, 4) for name, value in numbers.items()}


def retrieval(subject: Subject, batches: Sequence[Batch], rerank: int) -> Numbers:
    """Return recall in percent by ITC, and by ITM where it was trained, with their means, ceilings and chance.

    `mean_recall` is the mean of R@1, R@5 and R@10 both ways. A ceiling below 100 comes from captions that describe
    several pictures.
    """
    found = retrieve(subject.model, batches, rerank=rerank if "itm" in subject.objectives else 0)
    numbers = {}
    for score in sorted({key.partition("/")[0] for key in found.rankings}):
        recalls = {
            f"{score}/{direction}/r{k}": found.rankings[f"{score}/{direction}"].measures()[f"r{k}"]
            for direction in DIRECTIONS
            for k in RECALL_AT
        }
        numbers |= recalls | {f"{score}/mean_recall": sum(recalls.values()) / len(recalls)}
    ceilings = [found.ceilings[f"{direction}/r{k}"] for direction in DIRECTIONS for k in RECALL_AT]
    chance = [100 * min(1.0, k / found.pictures) for k in RECALL_AT]
    return numbers | {
        "ceiling/mean_recall": sum(ceilings) / len(ceilings),
        "chance/mean_recall": sum(chance) / len(chance),
        "captions": float(found.captions),
    }


def grounding(subject: Subject, shards: str, scenes: int) -> Numbers:
    """Return the percentages of downstream.grounding on expressions about single things."""
    task = Grounding()
    entries = task.checked(scene_annotations("grounding", shards, limit=scenes), train=False)
    config = FinetuneConfig(model=subject.config.model, data=FinetuneData(max_tokens=subject.tokenizer.max_tokens))
    maker = ExampleMaker(config, task, subject.tokenizer, train=False)
    predictions = task.predictions(subject.model, held_out_batches(entries, maker, config.eval.batch_size))
    found = task.measures(entries.entries, predictions)
    return {name: found[name] for name in _GROUNDING}


def swaps(subject: Subject, processor: SimlaProcessor, shards: str, scenes: int) -> Numbers:
    """Return how often, in percent, a caption scores above itself with one change (downstream.probes); chance is 50.

    By SCORE/attribute, noun and relation, each the mean of its kinds of change, and SCORE/mean.
    """
    probes = load_probes(shards, limit=scenes)
    found = probe_measures(probes.entries, score_probes(subject.model, processor, probes))
    numbers = {}
    for score in ("itc", "itm") if "itm" in subject.objectives else ("itc",):
        of = {kind: [v for name, v in found.items() if name.startswith(f"{score}/kind/{kind}_")] for kind in SWAPPED}
        means = {kind: sum(values) / len(values) for kind, values in of.items() if values}
        numbers |= {f"{score}/{kind}": mean for kind, mean in means.items()}
        numbers[f"{score}/mean"] = sum(means.values()) / len(means)
    return numbers | {"probes": found["probes"]}


@torch.no_grad()
def keywords(subject: Subject, batches: Sequence[Batch], scenes: Sequence[dict[str, Any]]) -> Numbers:
    """Return the average precision, in percent, of ranking the kit's things by how likely they are in a picture.

    `itc`: by the cosine of the picture and a thing's name. `psl`: by the concept head, a name's score the mean over its
    word pieces. `prior`: one ranking for all pictures, by how often things are in these very pictures.
    """
    names = sorted({kit().concepts[concept].name for concept in kit().seen})
    number = {name: i for i, name in enumerate(names)}
    there = torch.zeros(len(scenes), len(names))
    for row, scene in enumerate(scenes):
        for thing in scene["objects"]:
            there[row, number[thing["name"]]] = 1.0
    features = torch.cat([subject.model.image_feature(subject.model.image_encoder(b["image"])) for b in batches])
    pieces = [subject.tokenizer.encode(name)[0] for name in names]
    scores = {"itc": features @ _name_features(subject, pieces).T, "prior": there.sum(0).expand_as(there)}
    if "psl" in subject.objectives:
        logits, special = subject.model.concept_head(features), set(subject.config.model.vocabulary.special)
        words = [[piece for piece in name if piece not in special] for name in pieces]
        scores["psl"] = torch.stack([logits[:, name].mean(1) for name in words], dim=1)
    precision = {name: average_precision(score, there) for name, score in scores.items()}
    return {f"{name}/average_precision": float(100 * total / count) for name, (total, count) in precision.items()}


def _name_features(subject: Subject, pieces: Sequence[Sequence[int]]) -> Tensor:
    rows = [torch.tensor(ids) for ids in pieces]
    ids = pad_sequence(rows, batch_first=True, padding_value=subject.config.model.vocabulary.pad)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    stream = subject.model.stream
    return subject.model.text_feature(stream(stream.embeddings(ids), mask)[0])


def scene_records(shards: str, limit: int) -> list[dict[str, Any]]:
    """Return what is known of the first scenes of a split; nothing for pairs that are no scenes."""
    files = ShardFiles([open_shard(path) for path in find_shards(shards)])
    places = [(shard, n) for shard, index in enumerate(files.shards) for n in range(len(index))][:limit]
    records = [json.loads(files.read(*place).get("json") or b"{}") for place in places]
    return records if all("objects" in record for record in records) else []
