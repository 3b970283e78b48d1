"""Rows on disk: one JSON file a cell, named after the cell and the configuration and code it is of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data_efficiency.grid import Cell

Row = dict[str, Any]
DONE, FAILED = "done", "failed"
"""Values of a row's `status`."""


def row_path(folder: Path, cell: Cell, config: str, code: str) -> Path:
    """Return the file of a cell under a configuration and a code hash."""
    return folder / f"{cell.name}.{config}.{code}.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all: processes that write it at the same time do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def write_row(path: Path, row: Row) -> None:
    """Write a row, whole or not at all. Raises ValueError, naming it, for a number that is not finite."""
    if broken := ", ".join(_not_finite(row, "")):
        raise ValueError(
            f"{row['cell']} is no result: {broken}; lower its optim.learning_rate or look at its train.log"
        )
    write_whole(path, json.dumps(row, indent=1) + "\n")


def _not_finite(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"


def read_row(path: Path) -> Row | None:
    """Return a row; None where there is none. Raises ValueError for a file that is none."""
    if not path.is_file():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(row, dict) or "status" not in row:
            raise ValueError("no `status`")
    except ValueError as error:
        raise ValueError(f"{path} is no row ({error}); remove it, and the cell is run again") from None
    return row


def read_rows(folder: Path) -> list[Row]:
    """Return all rows of a grid, of whatever code and configuration, ordered by file name."""
    return [row for path in sorted(folder.glob("*.json")) if (row := read_row(path)) is not None]
