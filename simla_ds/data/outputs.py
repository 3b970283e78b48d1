"""What a model says of a shard's pairs, as files: features, and shards of chosen pairs. A file is there when whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simla_ds.data.shards import ShardFiles, ShardWriter

Rows = list[dict[str, Any]]
"""A dictionary per caption: `key`, `place` (number of the sample), `caption_number`, `caption`, and what was made."""
FEATURES = ("image_feature", "text_feature")


def write_features(path: Path, rows: Rows, width: int, kind: Literal["parquet", "npy"]) -> None:
    """Write PATH.parquet, or PATH.image.npy and PATH.text.npy (T, width) float32 with PATH.jsonl."""
    said = [{name: row[name] for name in ("key", "caption_number", "caption")} for row in rows]
    if kind == "npy":
        for name in FEATURES:
            with _whole(Path(f"{path}.{name.partition('_')[0]}.npy")) as temporary, open(temporary, "wb") as file:
                np.save(file, np.array([row[name] for row in rows], dtype=np.float32).reshape(-1, width))
        write_text(Path(f"{path}.jsonl"), "".join(f"{json.dumps(row)}\n" for row in said))
        return
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {name: [row[name] for row in said] for name in ("key", "caption_number", "caption")}
    for name in FEATURES:
        values = pa.array(np.concatenate([row[name] for row in rows]) if rows else [], pa.float32())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, width)
    with _whole(Path(f"{path}.parquet")) as temporary:
        parquet.write_table(pa.table(columns), temporary)


def copy_pairs(files: ShardFiles, number: int, rows: Rows, out: Path) -> None:
    """Write a shard of these pairs alone: pictures byte for byte, captions left out of the json or txt.

    No shard is written without rows.
    """
    kept: dict[int, list[str]] = {}
    for row in rows:
        kept.setdefault(row["place"], []).append(row["caption"])
    if not kept:
        return
    with ShardWriter(out) as shard:
        for place, captions in kept.items():
            members = {name: data for name, data in files.read(number, place).items() if data is not None}
            texts = json.loads(members["json"]) if "json" in members else {}
            texts = texts if isinstance(texts, dict) else {}  # a list of other things, the caption is in the txt
            said = captions if len(captions) > 1 or isinstance(texts.get("caption"), list) else captions[0]
            members["json"] = json.dumps({**texts, "caption": said}).encode()
            members.pop("txt", None)
            shard.add(files.shards[number].key(place), members)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a name to write to; it becomes `path` when nothing went wrong."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 under a temporary name, then rename."""
    with _whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
