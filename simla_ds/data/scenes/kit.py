"""The sprite kit: what may be drawn, what it is called, and who may see it (kit/README.md describes the files).

Pictures are decoded on first use and kept, since a process composes thousands of scenes from the same few hundred.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

KIT = Path(__file__).with_name("kit")
FAINT = 32
"""Alpha below this (of 255) is glow or anti-aliasing: a viewer would not draw a box around it."""


@dataclass(frozen=True)
class Concept:
    """One drawable thing; `similar` holds the ids a fair viewer could mix up with it."""

    id: str
    name: str
    plural: str
    head: str
    article: str
    mass: bool
    plural_only: bool
    category: str
    keywords: tuple[str, ...]
    similar: frozenset[str]
    colours: dict[str, str | None]

    @property
    def countable(self) -> bool:
        """Whether "two Xs" is English for two drawings of it."""
        return not (self.mass or self.plural_only)

    @property
    def names_a_size(self) -> bool:
        """Whether "a large X" would contradict itself (a small airplane)."""
        return self.name.startswith("small ")


@dataclass(frozen=True)
class Photo:
    """One background picture: `name` is a noun phrase ("a windmill"), `may_contain` names a list in the kit."""

    file: str
    name: str
    plural: bool
    may_contain: str
    subject: str
    painting: bool


def _read(name: str):
    return json.loads((KIT / name).read_text(encoding="utf-8"))


class Kit:
    """The kit's tables and a cache of its decoded pictures. Use `kit()`: one per process."""

    def __init__(self) -> None:
        fields = Concept.__dataclass_fields__
        self.concepts: dict[str, Concept] = {}
        for row in _read("concepts.json"):
            row |= {"keywords": tuple(row["keywords"]), "similar": frozenset(row["similar"])}
            self.concepts[row["id"]] = Concept(**{name: row[name] for name in fields})
        backgrounds = _read("backgrounds.json")
        self.may_contain = {kind: frozenset(ids) for kind, ids in backgrounds["may_contain"].items()}
        self.photos = {row["file"]: self._photo(row) for row in backgrounds["photos"]}
        splits = _read("splits.json")
        self.seen: tuple[str, ...] = tuple(splits["concepts"]["seen"])
        self.held_out: tuple[str, ...] = tuple(splits["concepts"]["held_out"])
        self.train_vendors: tuple[str, ...] = tuple(splits["vendors"]["train"])
        self.held_out_vendors: tuple[str, ...] = tuple(splits["vendors"]["held_out"])
        self.backgrounds: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in splits["backgrounds"].items()}
        self._archives: dict[str, zipfile.ZipFile] = {}
        self._sprites: dict[tuple[str, str], Image.Image] = {}
        self._resized: dict[tuple[str, int], Image.Image] = {}

    @staticmethod
    def _photo(row: dict) -> Photo:
        return Photo(
            row["file"], row["kind"], row["plural"], row["may_contain"], row["subject"], painting=row["painting"]
        )

    @cached_property
    def vendors(self) -> tuple[str, ...]:
        return self.train_vendors + self.held_out_vendors

    def sprite(self, vendor: str, concept: str) -> Image.Image:
        """Return the RGBA drawing, cropped to what can be seen of it."""
        key = (vendor, concept)
        if key not in self._sprites:
            if vendor not in self._archives:
                self._archives[vendor] = zipfile.ZipFile(KIT / "sprites" / f"{vendor}.zip")
            data = self._archives[vendor].read(f"{concept}.webp")
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            visible = image.getchannel("A").point([255 * (alpha >= FAINT) for alpha in range(256)])
            self._sprites[key] = image.crop(visible.getbbox())
        return self._sprites[key]

    def background(self, file: str, short_side: int) -> Image.Image:
        """Return the RGB picture with its short side at `short_side` pixels."""
        key = (file, short_side)
        if key not in self._resized:
            image = Image.open(KIT / "backgrounds" / file).convert("RGB")
            scale = short_side / min(image.size)
            width, height = (max(short_side, round(side * scale)) for side in image.size)
            self._resized[key] = image.resize((width, height), Image.Resampling.LANCZOS)
        return self._resized[key]

    def confusable(self, one: str, other: str) -> bool:
        """Whether a phrase naming `one` might be taken to mean `other`: by looks, head noun or another name."""
        a, b = self.concepts[one], self.concepts[other]
        by_name = a.head == b.head or a.name in b.keywords or b.name in a.keywords
        return other in a.similar or one in b.similar or by_name


def opaque_pixels(sprite: Image.Image) -> np.ndarray:
    """Return the (N, 3) uint8 colours of the pixels that are more drawing than background."""
    pixels = np.asarray(sprite)
    return pixels[pixels[..., 3] >= 128][:, :3]


@lru_cache(maxsize=1)
def kit() -> Kit:
    """Return this process's kit."""
    return Kit()
