"""Annotation files: JSON lists or JSON Lines of entries, checked whole before anything runs, and their pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from simla_ds.data.sample import SkipSample, read_picture
from simla_ds.data.shards import ShardFiles

SHOWN = 20
"""Problems told at once."""

Entry = dict[str, Any]


class Pictures(Protocol):
    """Where the pictures that entries name are found."""

    def has(self, name: str) -> bool:
        """Whether there is such a picture."""
        ...

    def members(self, name: str) -> Mapping[str, bytes | None]:
        """Return the picture's bytes by extension, as data.sample.read_picture takes them. Raises OSError."""
        ...


@dataclass(frozen=True)
class FolderPictures:
    """Files under a folder."""

    root: Path

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.root / name).is_file()

    def members(self, name: str) -> Mapping[str, bytes | None]:
        """Return the file's bytes; the format is told by the bytes."""
        return {"png": (self.root / name).read_bytes()}


@dataclass
class ShardPictures:
    """Samples of shards, by key or key.jpg."""

    files: ShardFiles
    places: Mapping[str, tuple[int, int]]
    """Shard and number of each key."""

    def has(self, name: str) -> bool:
        """Whether a sample has this key."""
        return self._key(name) in self.places

    def members(self, name: str) -> Mapping[str, bytes | None]:
        """Return the sample's files."""
        return self.files.read(*self.places[self._key(name)])

    @staticmethod
    def _key(name: str) -> str:
        return name.removesuffix(".jpg")


@dataclass(frozen=True)
class Annotations:
    """The entries of one split and their pictures."""

    source: str
    """For messages."""
    entries: Sequence[Entry]
    pictures: Pictures

    def picture(self, name: str) -> Image.Image:
        """Return a picture that entries name, upright RGB. Raises ValueError."""
        try:
            return read_picture(self.pictures.members(name))
        except (SkipSample, OSError) as error:
            raise ValueError(f"{self.source}: picture {name} cannot be used: {error}") from None


class BadAnnotations(ValueError):
    """Everything that is wrong with an annotation file, a line each."""

    def __init__(self, source: str, problems: list[str]):
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        super().__init__(f"{source}: {len(problems)} problem(s){lines}{more}")
        self.problems = problems


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; of JSON Lines (*.jsonl) the list of its lines. Raises ValueError, OSError."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # JSON may hold U+2028
    return json.loads(text)


def read_annotations(file: Path, image_root: Path | None) -> Annotations:
    """Read a JSON list of objects, or JSON Lines. ValueError when the file is none; entries are not checked here."""
    try:
        entries = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        kind = type(entries).__name__ if not isinstance(entries, list) else "list with other things"
        raise ValueError(f"{file} must hold a list of entries (JSON objects), not one {kind}")
    if not entries:
        raise ValueError(f"{file} holds no entries")
    return Annotations(str(file), entries, FolderPictures(image_root or file.parent))


def check_annotations(
    annotations: Annotations,
    pictures_of: Callable[[Entry], Sequence[str]],
    problems_of: Callable[[Entry], Iterator[str]],
    identity: Callable[[Entry], Hashable | None],
) -> None:
    """Check every entry: its keys (problems_of), its pictures, and that no identity (None: it has none) is there twice.

    Raises BadAnnotations with all that was found.
    """
    problems, names = [], Counter()
    there = cache(annotations.pictures.has)  # many entries may be about one picture
    for number, entry in enumerate(annotations.entries):
        wrong = list(problems_of(entry))
        if not wrong:
            missing = [name for name in pictures_of(entry) if not there(name)]
            wrong = [f"picture {name} is missing" for name in missing]
            if (name := identity(entry)) is not None:
                names[name] += 1
                wrong += [f"id {name} is there twice"] if names[name] == 2 else []
        problems += [f"entry {number}: {problem}" for problem in wrong]
    if problems:
        raise BadAnnotations(annotations.source, problems)


def wrong_text(entry: Entry, *keys: str) -> Iterator[str]:
    """Say which of some keys is missing or holds no text."""
    for key in keys:
        if key not in entry:
            yield f"key {key!r} is missing"
        elif not isinstance(entry[key], str):
            yield f"key {key!r} must hold text, not {json.dumps(entry[key])[:40]}"
