"""A page of scenes with their captions and boxes: the quickest check there is of what a model will be shown."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INKS = ("#e6194b", "#1f77b4", "#2ca02c", "#b8860b", "#9932cc")
TILE, TEXT, GAP, LINE = 256, 84, 12, 16


def contact_sheet(samples: Sequence[tuple[str, dict[str, bytes]]], columns: int = 6) -> Image.Image:
    """Return a sheet of the samples' pictures, enlarged, with a box around what each phrase points at."""
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + rows * (TILE + TEXT + GAP)), "white")
    for number, (key, members) in enumerate(samples):
        left = GAP + number % columns * (TILE + GAP)
        top = GAP + number // columns * (TILE + TEXT + GAP)
        _draw_tile(sheet, left, top, key, members)
    return sheet


def _draw_tile(sheet: Image.Image, left: int, top: int, key: str, members: dict[str, bytes]) -> None:
    record = json.loads(members["json"])
    picture = Image.open(io.BytesIO(members["jpg"])).resize((TILE, TILE), Image.Resampling.LANCZOS)
    sheet.paste(picture, (left, top))
    pen, small, font = ImageDraw.Draw(sheet), ImageFont.load_default(11), ImageFont.load_default(13)
    scale = TILE / record["size"]
    pointing = [phrase for phrase in record["phrases"] if phrase["objects"]]
    for phrase, ink in zip(pointing, INKS, strict=False):
        x, y, width, height = (side * scale for side in phrase["box"])
        x, y = x + left, y + top
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=ink, width=2)
        pen.rectangle((x, y - 12, x + pen.textlength(phrase["text"], small) + 4, y), fill=ink)
        pen.text((x + 2, y - 13), phrase["text"], fill="white", font=small)
    lines = [key, *textwrap.wrap(record["caption"], 40)]
    for row, line in enumerate(lines):
        pen.text((left, top + TILE + 2 + row * LINE), line, fill="#888" if row == 0 else "black", font=font)
