"""What the cells of a grid are made from: the pairs, nested subsets of them, and start weights that sets share.

WORK/scenes/                    the data, unless the grid names shards
WORK/pairs-HASH/0.02-0/train/   the share 0.02 for seed 0
WORK/start/albef-1-0-HASH/      start weights of a set whose network is not that of the others
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from benchmarks.data_efficiency.identity import config_hash
from simla_ds.config import Config
from simla_ds.data.scenes.prepare import prepare_scenes
from simla_ds.data.shards import ShardFiles, find_shards, open_shard, write_shards
from simla_ds.data.text import TextTokenizer
from simla_ds.data.visual_tokens import load_visual_tokenizer
from simla_ds.hub import save_model_folder
from simla_ds.model.pretrained import initialise
from simla_ds.model.simla import Simla

_SUBSET = 4  # so that no two uses of a seed draw the same numbers (data.order has 1 to 3)
_SHARD_SIZE = 1000
_NONE: Mapping[str, str] = MappingProxyType({})


class Pairs:
    """A grid's data. `digest` identifies it."""

    def __init__(self, work: Path, scenes: Mapping[str, Any], train: str = "", test: Mapping[str, str] = _NONE):
        """Prepare the scenes if need be.

        Args:
            work: folder for what is made.
            scenes: options of SceneOptions; empty: train (shards, as data.train) and test (shards by split) instead.

        Raises ValueError or FileExistsError when there are no data to be had.
        """
        self.work = work
        if scenes:
            root = work / "scenes"
            manifest = prepare_scenes(root, **scenes)
            self.train, self.splits = str(root / "train"), {name: str(root / name) for name in manifest["counts"]}
            self.digest = config_hash(manifest["sha256"])
        else:
            self.train, self.splits = train, dict(test)
            self.digest = config_hash({name: _sizes(shards) for name, shards in {"train": train, **test}.items()})
        self.files = ShardFiles([open_shard(path) for path in find_shards(self.train)])
        self.places = [(shard, number) for shard, index in enumerate(self.files.shards) for number in range(len(index))]

    def __len__(self) -> int:
        return len(self.places)

    def count(self, fraction: float) -> int:
        """Return how many pairs a share is."""
        return max(1, round(fraction * len(self)))

    def subset(self, fraction: float, seed: int) -> str:
        """Return the shards of a share: the first pairs of the seed's permutation, so that larger ones hold smaller."""
        count = self.count(fraction)
        if count == len(self):
            return self.train
        target = self.work / f"pairs-{self.digest}" / f"{fraction:g}-{seed}" / "train"
        if not target.is_dir():
            chosen = sorted(np.random.default_rng([_SUBSET, seed]).permutation(len(self))[:count].tolist())
            fresh = target.with_name(f".train.{config_hash(str(target))}")
            write_shards((self._sample(number) for number in chosen), fresh, _SHARD_SIZE)
            fresh.rename(target)
        return str(target)

    def _sample(self, number: int) -> tuple[str, dict[str, bytes]]:
        shard, place = self.places[number]
        members = self.files.read(shard, place)
        return self.files.shards[shard].key(place), {name: data for name, data in members.items() if data is not None}

    def beside(self, name: str) -> str:
        """Return the folder `tokenizer` or `visual_tokens` beside the training shards."""
        train = Path(self.train)
        return str((train if train.is_dir() else train.parent).parent / name)


def completed(config: Config, pairs: Pairs, fraction: float, queue_size: int) -> Config:
    """Fill in what a cell's configuration takes from its data: paths, and a queue of at most a quarter of its pairs.

    And the number of visual tokens, so that sets that read none have the same network: one seed then draws them the
    same start weights.
    """
    data = replace(
        config.data,
        train=pairs.subset(fraction, config.train.seed),
        tokenizer=config.data.tokenizer or pairs.beside("tokenizer"),
        visual_tokenizer=config.data.visual_tokenizer or pairs.beside("visual_tokens"),
    )
    codes = load_visual_tokenizer(data.visual_tokenizer, config.model.vision.grid).vocabulary_size
    vocabulary = replace(config.model.vocabulary, visual_size=codes)
    itc = replace(config.objectives.itc, queue_size=min(queue_size, pairs.count(fraction) // 4))
    return replace(
        config,
        data=data,
        model=replace(config.model, vocabulary=vocabulary),
        objectives=replace(config.objectives, itc=itc),
    )


def with_start_weights(config: Config, base: Config, folder: Path) -> Config:
    """Return the configuration with start weights: those that the base network has by this seed, where shapes agree.

    config, base: completed. The base network itself needs no file: its seed says it all. Elsewhere the shared
    parameters are the base's, the others (ALBEF's token types) those that seed and init.* give this network.
    """
    ours, theirs = (_with_vocabulary(c) for c in (config, base))
    if ours.model == theirs.model or config.init.checkpoint:
        return config
    if not folder.is_dir():
        shared = _network(theirs).state_dict()
        network = _network(ours)
        with torch.no_grad():
            for name, parameter in network.state_dict().items():
                if name in shared and shared[name].shape == parameter.shape:
                    parameter.copy_(shared[name])
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model_folder(network, folder)
    return replace(config, init=replace(config.init, checkpoint=str(folder)))


def _sizes(shards: str) -> list[tuple[str, int]]:
    return [(Path(path).name, Path(path).stat().st_size) for path in find_shards(shards)]


def _network(config: Config) -> Simla:
    torch.manual_seed(config.train.seed)  # as engine.build does
    network = Simla(config.model)
    initialise(network, config.init)
    return network


def _with_vocabulary(config: Config) -> Config:
    words = TextTokenizer(Path(config.data.tokenizer), add_sep=config.model.vocabulary.add_sep).vocabulary
    vocabulary = replace(words, visual_size=config.model.vocabulary.visual_size)
    return replace(config, model=replace(config.model, vocabulary=vocabulary))


def identity(config: Config) -> dict[str, Any]:
    """Return a configuration as JSON values without where things lie: paths say nothing about a result."""
    said = json.loads(json.dumps(asdict(config)))
    for section, name in (("data", "train"), ("data", "val"), ("data", "tokenizer"), ("data", "visual_tokenizer"),
                          ("data", "cache_dir"), ("data", "scenes_dir"), ("init", "checkpoint")):  # fmt: skip
        said[section].pop(name)
    return {name: value for name, value in said.items() if name not in ("output", "resume")}
