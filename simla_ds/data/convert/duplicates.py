"""Pictures that were there before: the same file, or one that looks the same by its perceptual hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple

from PIL import Image

from simla_ds.data.convert.processes import in_order
from simla_ds.data.convert.rows import TarRow
from simla_ds.data.convert.settings import Settings
from simla_ds.data.sample import SkipSample, decode_picture, open_picture, picture_bytes, read_record, stable_hash
from simla_ds.data.shards import find_shards, index_tar

LOOK_ROOM = 256
"""Pictures are decoded at this size at least for their perceptual hash."""
_BITS = 64


class Fingerprint(NamedTuple):
    """What is kept of a picture to know it again."""

    file: int
    """Hash of its file."""
    look: int
    """Perceptual hash of 64 bits (pHash, imagehash); -1 when looks are not compared."""
    image: int
    """Hash of its image id; -1 when the source gives none."""


def fingerprint(data: bytes, picture: Image.Image, image_id: str | None, looks: bool) -> Fingerprint:
    """Return what is kept of a picture. picture: data decoded."""
    file = int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
    image = -1 if image_id is None else stable_hash(image_id)
    return Fingerprint(file, int(str(_imagehash().phash(picture)), 16) if looks else -1, image)


class Seen:
    """The pictures so far, found again by file or by look.

    Looks that differ in at most d bits agree in at least one of d + 1 bands of bits, so only those that share a band
    with the one in question are compared.
    """

    def __init__(self, distance: int):
        self.distance = distance
        edges = [_BITS * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._files: dict[int, int] = {}
        self._images: set[int] = set()
        self._looks: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(self, picture: Fingerprint) -> None:
        """Remember a picture."""
        self._files.setdefault(picture.file, picture.image)
        if picture.image >= 0:
            self._images.add(picture.image)
        if picture.look >= 0:
            for key in self._keys(picture.look):
                self._looks.setdefault(key, []).append((picture.look, picture.image))

    def has_image(self, picture: Fingerprint) -> bool:
        """Whether there was a picture with this image id."""
        return picture.image in self._images

    def same_file(self, picture: Fingerprint) -> bool:
        """Whether the same file was there under another image id, or without one."""
        return picture.file in self._files and not _same_image(self._files[picture.file], picture.image)

    def same_look(self, picture: Fingerprint) -> bool:
        """Whether a picture that looks the same was there under another image id, or without one."""
        return picture.look >= 0 and any(
            (look ^ picture.look).bit_count() <= self.distance and not _same_image(image, picture.image)
            for key in self._keys(picture.look)
            for look, image in self._looks.get(key, ())
        )

    def _keys(self, look: int) -> Iterator[tuple[int, int]]:
        for band, (low, mask) in enumerate(self._bands):
            yield band, look >> low & mask


class DuplicateFilter:
    """Says of each picture in turn whether it was there before, or is in an evaluation set."""

    def __init__(self, settings: Settings, workers: int):
        self.settings, self.seen = settings, Seen(settings.near_distance)
        self.evaluation = Seen(settings.near_distance)
        if settings.looks:
            _imagehash()  # says now, not in a worker, that it isn't there
        for picture in in_order(_fingerprints, _samples(settings.against), workers if settings.against else 1):
            if picture is not None:
                self.evaluation.add(picture)

    def judge(self, picture: Fingerprint) -> str:
        """Return why it is dropped, or nothing, and then remember it."""
        other = picture._replace(image=-1)  # in an evaluation set an equal id is no excuse
        if self.evaluation.has_image(picture) or self.evaluation.same_file(other) or self.evaluation.same_look(other):
            return "picture in evaluation set"
        if self.settings.duplicates != "off" and self.seen.same_file(picture):
            return "picture twice"
        if self.settings.duplicates == "near" and self.seen.same_look(picture):
            return "picture looks like another"
        self.seen.add(picture)
        return ""


def _samples(specs: Iterable[str]) -> Iterator[TarRow]:
    for spec in specs:
        for path in find_shards(spec, "--against"):
            shard = index_tar(path)
            yield from (TarRow(shard.key(i), path, shard.sample(i)) for i in range(len(shard)))


def _fingerprints(rows: list[TarRow]) -> list[Fingerprint | None]:
    return [_fingerprint(row) for row in rows]


def _fingerprint(row: TarRow) -> Fingerprint | None:
    """Of a sample of an evaluation set; None when its picture can't be read."""
    try:
        members = row.members()
        data = picture_bytes(members)
        picture = decode_picture(open_picture(data), room=LOOK_ROOM)
    except SkipSample:
        return None
    try:
        image_id = read_record(row.name, members).image_name
    except SkipSample:
        image_id = None
    return fingerprint(data, picture, image_id, looks=True)


def _same_image(first: int, second: int) -> bool:
    return first == second and first >= 0


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError:
        raise ValueError("--duplicates near and --against need imagehash; pip install 'simla_ds[data]'") from None
    return imagehash
