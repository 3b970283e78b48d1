"""The embedded scenes as the tasks read them: what is in each, by its sample's JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from simla_ds.data.scenes.colours import NEIGHBOURS
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

    @property
    def colours(self) -> list[str | None]:
        """Each thing's colour; None: it has no one colour, so nobody calls it by any."""
        return [thing["colour"] for thing in self.record["objects"]]

    def only(self, colour: str) -> int | None:
        """Return the number of the one thing of a colour; None where there are several, or one much like it."""
        others = [other for other in self.colours if other not in (colour, None)]
        return self.colours.index(colour) if self.colours.count(colour) == 1 and told_apart(colour, others) else None

    def lacks(self, colour: str) -> bool:
        """Whether neither a thing nor the background has a colour or one much like it."""
        if not self.plain:
            return False
        behind = self.record["background"]["colour"].split()[-1]  # of "light blue"
        return told_apart(colour, [behind, *filter(None, self.colours)])

    def holds(self, relation: str, i: int, j: int) -> bool:
        """Whether a relation is clearly true."""
        return [relation, i, j] in self.record["relations"]


def told_apart(colour: str, others: Iterable[str]) -> bool:
    """Whether a colour is none of the others, and nobody would mix it up with them."""
    return all(other != colour and frozenset((colour, other)) not in NEIGHBOURS for other in others)


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
