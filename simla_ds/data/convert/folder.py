"""A folder of one's own: pictures with a .txt beside each, or with one table (.csv, .tsv, .jsonl, .parquet) for all.

NAME.txt holds a caption per line. A table has a row per caption: a column with the picture's name below the folder
(or, in .parquet, with its bytes), one with the caption or a list of them, and optionally image_id.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simla_ds.data.convert.rows import Row, require_folders, under
from simla_ds.data.shards import MAX_MEMBER_BYTES, MAX_TEXT_BYTES, PICTURES

IMAGE_COLUMNS = ("file_name", "image", "filename", "image_path", "image_name", "path", "filepath", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "comment", "description", "title")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def rows(
    *,
    images: Path,
    table: Path | None = None,
    delimiter: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Iterator[Row]:
    """Yield a row per row of the table, or per picture and .txt in sorted order. ValueError on an unknown table."""
    require_folders((images,))
    table = table or next((images / f"metadata{end}" for end in _TABLES if (images / f"metadata{end}").is_file()), None)
    if table is None:
        yield from _with_texts(images)
        return
    columns_known = False
    for number, fields in enumerate(_read_table(table, delimiter)):
        if fields and not columns_known:
            columns_known = True
            image_column = _column(table, fields, image_column, IMAGE_COLUMNS, "--image-column")
            caption_column = _column(table, fields, caption_column, CAPTION_COLUMNS, "--caption-column")
        image, caption = fields.get(image_column or ""), fields.get(caption_column or "")
        content = image.get("bytes") if isinstance(image, dict) else image  # how Hugging Face's data sets store them
        if isinstance(image, dict) and content is None:
            content = image.get("path")
        name = content if isinstance(content, str) else f"{table.name}[{number}]"
        picture = content if isinstance(content, bytes) else under((images,), content)
        yield Row(name, picture, caption, fields.get("image_id") or name)


def _with_texts(images: Path) -> Iterator[Row]:
    for folder, below, files in os.walk(images):
        below[:] = sorted(name for name in below if not name.startswith("."))
        shown: set[str] = set()
        texts = {stem: end for stem, end in map(os.path.splitext, files) if end.lower() == ".txt"}
        for file in sorted(files):
            stem, end = os.path.splitext(file)
            if file.startswith(".") or end.lower()[1:] not in PICTURES:
                continue
            shown.add(stem)
            path = os.path.join(folder, file)
            name = os.path.relpath(path, images)
            yield Row(name, (path,), _captions(os.path.join(folder, stem + texts.get(stem, ".txt"))), name)
        for stem in sorted(texts.keys() - shown):
            path = os.path.join(folder, stem + texts[stem])
            yield Row(os.path.relpath(path, images), (), _captions(path))


def _captions(path: str) -> list[str] | None:
    """Lines of a text file; None when there is none. Bytes that are no UTF-8 become half characters, found later."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        text = file.read(MAX_TEXT_BYTES + 1).decode("utf-8-sig", "surrogateescape")  # the last byte makes it too large
    return [line for line in text.splitlines() if line.strip()] or [""]


def _read_table(path: Path, delimiter: str | None) -> Iterator[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind not in _TABLES:
        raise ValueError(f"--table {path} is none of {', '.join(_TABLES)}")
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if kind == ".jsonl":
            yield from map(_read_line, file)
            return
        csv.field_size_limit(MAX_MEMBER_BYTES)
        reader = csv.DictReader(file, delimiter=delimiter or ("\t" if kind == ".tsv" else ","), skipinitialspace=True)
        try:
            yield from reader
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; is --delimiter right?") from None


def _read_line(line: str) -> dict[str, Any]:
    """Return the object in a line; of a line that is none an empty one, which is counted as a row without caption."""
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow; pip install 'simla_ds[data]'") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no whole parquet file: {error}") from None


def _column(table: Path, fields: dict, chosen: str | None, usual: tuple[str, ...], option: str) -> str:
    found = chosen or next((name for name in usual if name in fields), None)
    if found is None or found not in fields:
        raise ValueError(f"{table} has the columns {', '.join(map(str, fields))}; name one with {option}")
    return found
