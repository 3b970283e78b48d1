"""The embedded scenes as the tasks read them: what is in each, by its sample's JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from simla_ds.data.shards import ShardFiles, find_shards, open_shard
from simla_ds.downstream.annotations import ShardPictures


@dataclass(frozen=True)
class Scene:
    """One sample: its key, and its JSON as the docstring of simla_ds.data.scenes lays it out."""

    key: str
    record: dict[str, Any]

    @property
    def names(self) -> set[str]:
        """Names of all things."""
        return {thing["name"] for thing in self.record["objects"]}

    @property
    def single(self) -> dict[int, str]:
        """Names, by number, of things whose name nothing else in the scene has."""
        counts = Counter(thing["name"] for thing in self.record["objects"])
        return {i: o["name"] for i, o in enumerate(self.record["objects"]) if counts[o["name"]] == 1}

    @property
    def plain(self) -> bool:
        """Whether nothing but its things is to be seen: behind others, a photo may show more."""
        return self.record["background"]["kind"] == "plain"

    def holds(self, relation: str, i: int, j: int) -> bool:
        """Whether a relation is clearly true."""
        return [relation, i, j] in self.record["relations"]


def read_scenes(shards: str, limit: int = 0) -> tuple[list[Scene], ShardPictures]:
    """Return the first `limit` scenes (0: all) of shards, given as data.train, and where their pictures are.

    Raises ValueError when the shards hold no scenes.
    """
    files = ShardFiles([open_shard(path) for path in find_shards(shards)])
    places = {
        index.key(number): (shard, number) for shard, index in enumerate(files.shards) for number in range(len(index))
    }
    scenes = []
    for key, place in list(places.items())[: limit or None]:
        record = json.loads(files.read(*place).get("json") or b"{}")
        if "objects" not in record:
            raise ValueError(f"{shards}: sample {key} is no scene (its json has no `objects`); give an annotation file")
        scenes.append(Scene(key, record))
    return scenes, ShardPictures(files, places)
