"""What is measured of a trained model, zero-shot: nothing is fitted, nothing chosen, on scenes never seen.

Retrieval both ways, of all captions of a picture; grounding; keywords; swap probes. A set that trains no matching head
has no ITM and no grounding; ITC's measures are there for all. Beside each measure stands what chance gets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simla_ds.config import ModelConfig
from simla_ds.data.samples import Samples, open_files
from simla_ds.data.scenes.kit import kit
from simla_ds.data.shards import ShardFiles, find_shards, open_shard
from simla_ds.downstream.config import FinetuneConfig, FinetuneData
from simla_ds.downstream.examples import ExampleMaker, held_out_batches
from simla_ds.downstream.grounding import Grounding
from simla_ds.downstream.probes import load_probes, score_probes
from simla_ds.downstream.probes import measures as probe_measures
from simla_ds.downstream.retrieval import DIRECTIONS, RECALL_AT, retrieve, sharded
from simla_ds.downstream.scenes import scene_annotations
from simla_ds.hub import SimlaProcessor, load_model_folder
from simla_ds.model.simla import Simla
from simla_ds.objectives.psl import average_precision

Numbers = dict[str, float]
_GROUNDING = ("pointing", "proposal_iou50", "centre", "random", "proposal_random", "expressions")
"""What is kept of grounding's measures; proposal_iou50 is its accuracy: the right one of the scene's boxes."""
BATCH = 50
"""Pictures encoded at a time."""
SWAPPED = ("attribute", "noun", "relation")
"""What captions of probes are made false by."""


@dataclass(frozen=True)
class Subject:
    """A model under test and what it was trained for."""

    model: Simla
    config: ModelConfig
    processor: SimlaProcessor
    objectives: tuple[str, ...]

    def batches(self, shards: str, pictures: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield the first so many pictures with all of their captions, as retrieval reads them.

        Raises ValueError for one that cannot be used: a measure over fewer than said would mislead.
        """
        _, files = open_files(shards)
        places = [(shard, n) for shard, index in enumerate(files.shards) for n in range(len(index))][:pictures]
        skipped = Counter[str]()
        yield from sharded(Samples(files, places, self.processor), skipped, BATCH, workers=0)
        if skipped:
            raise ValueError(f"{shards} has {skipped.total()} sample(s) that cannot be measured: {dict(skipped)}")


def measure(
    folder: Path,
    objectives: tuple[str, ...],
    splits: Mapping[str, str],
    *,
    pictures: int,
    rerank: int,
    device: str = "cpu",
) -> Numbers:
    """Measure a model folder; names are SPLIT/KIND/...

    Args:
        folder: as pretraining writes it.
        objectives: those that trained it.
        splits: shards by the name of their split.
        pictures: the first so many of each split.
        rerank: candidates that ITM orders.
        device: "cpu" or "cuda".
    """
    model, config = load_model_folder(folder, device=device)
    subject = Subject(model, config, SimlaProcessor.from_pretrained(folder), objectives)
    numbers: Numbers = {}
    for split, shards in splits.items():
        kinds = {"retrieval": retrieval(subject, subject.batches(shards, pictures), rerank)}
        if scenes := scene_records(shards, pictures):
            if things_in(scenes) <= {*thing_names()}:  # not where things were held out: nothing ranks their names
                kinds["keywords"] = keywords(subject, subject.batches(shards, pictures), scenes)
            kinds["swaps"] = swaps(subject, shards, pictures)
            if "itm" in objectives:
                kinds["grounding"] = grounding(subject, shards, pictures)
        numbers |= {f"{split}/{kind}/{name}": value for kind, of in kinds.items() for name, value in of.items()}
    return {name: round(value, 4) for name, value in numbers.items()}


def retrieval(subject: Subject, batches: Iterator[Mapping[str, Tensor]], rerank: int) -> Numbers:
    """Return recall in percent by ITC, and by ITM where it was trained, with their means, ceilings and chance.

    `mean_recall` is the mean of R@1, R@5 and R@10 both ways; by ITM only of those below `rerank`: the others are ITC's,
    whatever the order of the first. A ceiling below 100 comes from captions that describe several pictures.
    """
    found = retrieve(subject.model, batches, rerank=rerank if "itm" in subject.objectives else 0)
    numbers = {}
    for score in sorted({key.partition("/")[0] for key in found.rankings}):
        recalls = {
            f"{score}/{direction}/r{k}": found.rankings[f"{score}/{direction}"].measures()[f"r{k}"]
            for direction in DIRECTIONS
            for k in RECALL_AT
        }
        decided = recall_at(rerank) if score == "itm" else RECALL_AT
        numbers |= recalls | {f"{score}/mean_recall": mean_recall(recalls, score, decided)}
    numbers["ceiling/mean_recall"] = mean_recall(found.ceilings, "", RECALL_AT)
    for name, decided in (("chance", RECALL_AT), ("chance_itm", recall_at(rerank))):
        numbers[f"{name}/mean_recall"] = chance_recall(found.pictures, decided)
    return numbers | {"captions": float(found.captions), "pictures": float(found.pictures)}


def recall_at(rerank: int) -> tuple[int, ...]:
    """Return the depths at which re-ranking so many candidates decides who is found."""
    return tuple(k for k in RECALL_AT if k < rerank) or RECALL_AT[:1]


def mean_recall(recalls: Mapping[str, float], score: str, depths: Sequence[int]) -> float:
    """Return the mean over both directions and these depths of recalls named SCORE/DIRECTION/rK."""
    start = f"{score}/" if score else ""
    return sum(recalls[f"{start}{way}/r{k}"] for way in DIRECTIONS for k in depths) / (len(DIRECTIONS) * len(depths))


def chance_recall(pictures: int, depths: Sequence[int]) -> float:
    """Return the mean recall of a random order among so many pictures."""
    return sum(100 * min(1.0, k / pictures) for k in depths) / len(depths)


def grounding(subject: Subject, shards: str, scenes: int) -> Numbers:
    """Return the percentages of downstream.grounding on expressions about single things."""
    task = Grounding()
    entries = task.checked(scene_annotations("grounding", shards, limit=scenes), train=False)
    tokenizer = subject.processor.tokenizer
    config = FinetuneConfig(model=subject.config, data=FinetuneData(max_tokens=tokenizer.max_tokens))
    maker = ExampleMaker(config, task, tokenizer, train=False)
    predictions = task.predictions(subject.model, held_out_batches(entries, maker, config.eval.batch_size, config.data))
    found = task.measures(entries.entries, predictions)
    return {name: found[name] for name in _GROUNDING}


def swaps(subject: Subject, shards: str, scenes: int) -> Numbers:
    """Return how often, in percent, a caption scores above itself with one change (downstream.probes); chance is 50.

    By SCORE/attribute, noun and relation, each the mean of its kinds of change, and SCORE/mean.
    """
    probes = load_probes(shards, limit=scenes)
    found = probe_measures(probes.entries, score_probes(subject.model, subject.processor, probes))
    numbers = {}
    for score in ("itc", "itm") if "itm" in subject.objectives else ("itc",):
        of = {kind: [v for name, v in found.items() if name.startswith(f"{score}/kind/{kind}_")] for kind in SWAPPED}
        means = {kind: sum(values) / len(values) for kind, values in of.items() if values}
        numbers |= {f"{score}/{kind}": mean for kind, mean in means.items()}
        numbers[f"{score}/mean"] = sum(means.values()) / len(means)
    return numbers | {"probes": found["probes"]}


@torch.no_grad()
def keywords(subject: Subject, batches: Iterator[Mapping[str, Tensor]], scenes: Sequence[Mapping[str, Any]]) -> Numbers:
    """Return the average precision, in percent, of ranking the kit's things by how likely they are in a picture.

    `itc`: by the cosine of the picture and a thing's name. `psl`: by the concept head, a name's score the mean over its
    word pieces. `prior`: an oracle, one ranking for all pictures by how often things are in these very pictures, which
    no model is told. `random`: what a random order is expected to get.
    """
    names = thing_names()
    there = things_there(scenes, names)
    model, device = subject.model, next(subject.model.parameters()).device
    features = torch.cat([model.image_feature(model.image_encoder(b["image"].to(device))) for b in batches])
    pieces = [subject.processor.tokenizer.encode(name)[0] for name in names]
    scores = {"itc": features @ _name_features(subject, pieces).T, "prior": there.sum(0).expand_as(there)}
    if "psl" in subject.objectives:
        logits, special = model.concept_head(features), set(subject.config.vocabulary.special)
        words = [[piece for piece in name if piece not in special] for name in pieces]
        scores["psl"] = torch.stack([logits[:, name].mean(1) for name in words], dim=1)
    precision = {name: average_precision(score.cpu(), there) for name, score in scores.items()}
    found = {f"{name}/average_precision": float(100 * total / count) for name, (total, count) in precision.items()}
    return found | {"random/average_precision": random_average_precision(there)}


def thing_names() -> list[str]:
    """Return what is ranked: the names of the kit's things that training shows."""
    return sorted({kit().concepts[concept].name for concept in kit().seen})


def things_in(scenes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of all things that scenes show."""
    return {thing["name"] for scene in scenes for thing in scene["objects"]}


def things_there(scenes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Tensor:
    """Return (scenes, names) float32: 1 where a scene shows a thing of that name."""
    number = {name: i for i, name in enumerate(names)}
    there = torch.zeros(len(scenes), len(names))
    for row, scene in enumerate(scenes):
        for thing in scene["objects"]:
            there[row, number[thing["name"]]] = 1.0
    return there


def random_average_precision(there: Tensor) -> float:
    """Return the average precision in percent that a random order of N answers is expected to get.

    With R right ones, the k-th answer is right with probability R / N, and then (R - 1) / (N - 1) of those before it:
    the mean over k of 1 / k + (R - 1) / (N - 1) * (1 - 1 / k).
    """
    right = there.sum(1).double()
    right, answers = right[right > 0], there.shape[1]
    inverse = float((1 / torch.arange(1, answers + 1, dtype=torch.double)).mean())
    return float(100 * (inverse + (right - 1) / max(1, answers - 1) * (1 - inverse)).mean())


def _name_features(subject: Subject, pieces: Sequence[Sequence[int]]) -> Tensor:
    rows = [torch.tensor(ids) for ids in pieces]
    ids = pad_sequence(rows, batch_first=True, padding_value=subject.config.vocabulary.pad)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    stream, device = subject.model.stream, next(subject.model.parameters()).device
    return subject.model.text_feature(stream(stream.embeddings(ids.to(device)), mask.to(device))[0])


def scene_records(shards: str, limit: int) -> list[dict[str, Any]]:
    """Return what is known of the first scenes of a split; nothing for pairs that are no scenes."""
    files = ShardFiles([open_shard(path) for path in find_shards(shards)])
    places = [(shard, n) for shard, index in enumerate(files.shards) for n in range(len(index))][:limit]
    records = [json.loads(files.read(*place).get("json") or b"{}") for place in places]
    return records if all("objects" in record for record in records) else []
