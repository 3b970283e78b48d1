"""What a worker does to a row: read it as the loader would, check it, make the picture smaller."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from simla_ds.data.convert.rows import AnyRow
from simla_ds.data.sample import SkipSample, decode_picture, open_picture, picture_bytes, read_record

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what is written, whatever the source; recorded in the manifest."""

    shard_size: int = 1000
    """Pictures per shard."""
    shorter_side: int = 0
    """Larger pictures are made smaller, to this many pixels along the shorter side, aspect kept; 0: never."""
    quality: int = 90
    """JPEG quality of pictures that were made smaller."""
    licence: str = ""
    """What the manifest says about the licence."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1, got {self.shard_size}")
        if self.shorter_side < 0:
            raise ValueError(f"--shorter-side must be 0 or more, got {self.shorter_side}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"--quality must be 1 to 95, got {self.quality}")


@dataclass
class Outcome:
    """What became of a row."""

    name: str
    reason: str = ""
    """Why it is dropped; empty: it is kept."""
    members: Mapping[str, bytes] | None = None
    """What the shard gets; None when dropped, or when only the verdict was asked for."""
    captions: int = 0


@dataclass(frozen=True)
class Judge:
    """Turns rows into outcomes, many at a time, in a worker process."""

    settings: Settings
    content: bool = True
    """Return the members too, not only the verdict."""

    def __call__(self, rows: list[AnyRow]) -> list[Outcome]:
        """Judge a chunk of rows, in order."""
        return [self.judge(row) for row in rows]

    def judge(self, row: AnyRow) -> Outcome:
        """Read and check one row."""
        try:
            members = row.members()
            record = read_record(row.name, members)
            extension, data = self._fit(picture_bytes(members))
        except SkipSample as skip:
            return Outcome(row.name, skip.reason)
        captions = list(record.captions)
        fields: dict[str, Any] = {"caption": captions[0] if len(captions) == 1 else captions}
        if record.image_name is not None:
            fields["image_id"] = record.image_name
        fields["source"] = row.name.encode("utf-8", "replace").decode()
        made = {extension: data, "json": json.dumps(fields, ensure_ascii=False).encode()} if self.content else None
        return Outcome(row.name, members=made, captions=len(captions))

    def _fit(self, data: bytes) -> tuple[str, bytes]:
        """Extension and content to write: as it came when it is small enough. Raises SkipSample."""
        picture = open_picture(data)
        width, height, extension = picture.width, picture.height, _EXTENSIONS[str(picture.format)]
        side = self.settings.shorter_side
        # twice the size wanted, for Lanczos to work on; an eighth is enough to find where a file breaks off
        room = math.ceil(2 * side * math.sqrt(max(width, height) / min(width, height))) if side else 1
        picture = decode_picture(picture, room)
        if not side or min(width, height) <= side:
            return extension, data
        shrink = side / min(picture.size)
        size = (max(side, round(picture.width * shrink)), max(side, round(picture.height * shrink)))
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=self.settings.quality)
        return "jpg", buffer.getvalue()
