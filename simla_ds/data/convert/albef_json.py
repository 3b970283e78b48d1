"""ALBEF's annotation files: one JSON list of {"image": path, "caption": text or list of texts, "image_id"?: any}.

One sample per entry, in file order, so that an epoch sees each entry once. Entries of one picture share their image_id
(the picture's name where none is given), which keeps them out of each other's negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simla_ds.data.convert.rows import Row, json_items


def rows(*, annotations: Sequence[Path], images: Path = Path(), replace: Sequence[str] = ()) -> Iterator[Row]:
    """Yield a row per entry. ValueError on a file that is no JSON list or a rule without `=`."""
    rules = [rule.partition("=")[::2] for rule in replace]
    if not all(rule.find("=") > 0 for rule in replace):
        raise ValueError(f"--replace {' '.join(replace)}: give rules of the form OLD=NEW")
    for file in annotations:
        for number, entry in enumerate(json_items(file)):
            fields = entry if isinstance(entry, dict) else {}
            image = fields.get("image")
            if not isinstance(image, str) or not image:
                yield Row(f"{file.name}[{number}]", (), fields.get("caption"))
                continue
            path = next((new + image[len(old) :] for old, new in rules if image.startswith(old)), image)
            image_id = fields.get("image_id")
            yield Row(image, (str(images / path),), fields.get("caption"), image if image_id is None else image_id)
