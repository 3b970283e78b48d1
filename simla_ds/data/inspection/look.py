"""What a worker finds in one sample, read by the same rules as in training."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from simla_ds.data.convert.rows import TarRow
from simla_ds.data.sample import (
    Record,
    SkipSample,
    clean_caption,
    decode_picture,
    open_picture,
    picture_bytes,
    read_record,
)
from simla_ds.data.text import TextTokenizer

TILE = 192
"""Side of a thumbnail in pixels."""
_NEVER_CUT = 100_000


@dataclass
class Finding:
    """One sample."""

    key: str
    reason: str = ""
    """Why training would pass it over; the rest is empty then."""
    kind: str = ""
    """JPEG, PNG, ..."""
    width: int = 0
    """Pixels, as stored."""
    height: int = 0
    bytes: int = 0
    """Of the picture's file."""
    picture: int = 0
    """Hash of the picture's file."""
    image_id: int = 0
    captions: tuple[str, ...] = ()
    """Cleaned as in training."""
    tokens: tuple[int, ...] = ()
    """Length of each caption in tokens, not cut; empty without a tokenizer."""
    unknown: int = 0
    """[UNK] among them."""
    thumbnail: bytes = b""
    """PNG, when it was asked for."""


@dataclass(frozen=True)
class Look:
    """Turns samples into findings, many at a time, in a worker process."""

    max_words: int
    tokenizer: str = ""
    """Folder; empty: captions are not tokenised."""

    def __call__(self, asked: list[tuple[TarRow, bool]]) -> list[Finding]:
        """Look at (sample, whether a thumbnail is wanted), in order."""
        return [self.look(row, shown) for row, shown in asked]

    def look(self, row: TarRow, shown: bool = False) -> Finding:
        """Look at one sample."""
        try:
            members = row.members()
            record = read_record(row.name, members)
            data = picture_bytes(members)
            stored = open_picture(data)
            size, kind = stored.size, str(stored.format)
            upright = decode_picture(stored, room=TILE)
        except SkipSample as skip:
            return Finding(row.name, skip.reason)
        finding = Finding(row.name, "", kind, *size, len(data), _hash(data), record.image_id)
        self._read(record, finding)
        if shown:
            upright.thumbnail((TILE, TILE))
            buffer = io.BytesIO()
            upright.save(buffer, "PNG")
            finding.thumbnail = buffer.getvalue()
        return finding

    def _read(self, record: Record, finding: Finding) -> None:
        finding.captions = tuple(clean_caption(caption, self.max_words) for caption in record.captions)
        if self.tokenizer:
            tokenizer = _tokenizer(self.tokenizer)
            encoded = [tokenizer.encode(caption)[0] for caption in finding.captions]
            finding.tokens = tuple(map(len, encoded))
            finding.unknown = sum(ids.count(tokenizer.vocabulary.unk) for ids in encoded)


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> TextTokenizer:
    return TextTokenizer(folder, max_tokens=_NEVER_CUT)


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
