"""What a worker does to a row: read it as the loader would, filter it, make the picture smaller."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from simla_ds.data.convert.cleaning import CaptionFilter
from simla_ds.data.convert.duplicates import LOOK_ROOM, Fingerprint, fingerprint
from simla_ds.data.convert.rows import AnyRow
from simla_ds.data.convert.settings import Settings
from simla_ds.data.sample import Record, SkipSample, decode_picture, open_picture, picture_bytes, read_record

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class Dropped(Exception):
    """A row that could be used but is filtered out; says why."""


@dataclass
class Outcome:
    """What became of a row."""

    name: str
    reason: str = ""
    """Why it is dropped; empty: it is kept."""
    members: Mapping[str, bytes] | None = None
    """What the shard gets; None when dropped, or when only the verdict was asked for."""
    captions: int = 0
    captions_dropped: dict[str, int] = field(default_factory=dict)
    """Captions left out of a picture that is kept, by reason."""
    fingerprint: Fingerprint | None = None
    """When pictures are compared."""


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
        outcome = Outcome(row.name)
        try:
            members = row.members()
            record = read_record(row.name, members)
            captions = self._captions(record, outcome)
            extension, data = self._picture(picture_bytes(members), record, outcome)
        except SkipSample as skip:
            return Outcome(row.name, skip.reason)
        except Dropped as dropped:
            return Outcome(row.name, str(dropped))
        if not self.content:
            return outcome
        fields: dict[str, Any] = {"caption": captions[0] if len(captions) == 1 else captions}
        if record.image_name is not None:
            fields["image_id"] = record.image_name
        fields["source"] = row.name.encode("utf-8", "replace").decode()
        outcome.members = {extension: data, "json": json.dumps(fields, ensure_ascii=False).encode()}
        return outcome

    def _captions(self, record: Record, outcome: Outcome) -> list[str]:
        """Captions to write. Raises Dropped, with the first one's reason, when none is left."""
        verdicts = [*map(CaptionFilter(self.settings), record.captions)]
        reasons = [reason for _, reason in verdicts if reason]
        if len(reasons) == len(verdicts):
            raise Dropped(reasons[0])
        outcome.captions, outcome.captions_dropped = len(verdicts) - len(reasons), dict(Counter(reasons))
        return [caption for caption, reason in verdicts if not reason]

    def _picture(self, data: bytes, record: Record, outcome: Outcome) -> tuple[str, bytes]:
        """Extension and content to write: as it came when it is small enough. Raises SkipSample, Dropped."""
        picture, settings = open_picture(data), self.settings
        width, height, extension = picture.width, picture.height, _EXTENSIONS[str(picture.format)]
        shorter, longer = sorted((width, height))
        if shorter < settings.min_side:
            raise Dropped("picture too small")
        if settings.max_aspect and longer > settings.max_aspect * shorter:
            raise Dropped("picture too long")
        # twice the size wanted, for Lanczos to work on; an eighth is enough to find where a file breaks off
        side = settings.shorter_side
        room = math.ceil(2 * side * math.sqrt(longer / shorter)) if side else 1
        picture = decode_picture(picture, max(room, LOOK_ROOM if settings.looks else 1))
        if settings.compares:
            outcome.fingerprint = fingerprint(data, picture, record.image_name, settings.looks)
        if not side or shorter <= side:
            return extension, data
        shrink = side / min(picture.size)
        size = (max(side, round(picture.width * shrink)), max(side, round(picture.height * shrink)))
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=settings.quality)
        return "jpg", buffer.getvalue()
