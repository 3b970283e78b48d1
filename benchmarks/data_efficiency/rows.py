"""Rows on disk: one JSON file a cell, named after the cell and the configuration and code it is of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.data_efficiency.grid import Cell

Row = dict[str, Any]
DONE, FAILED = "done", "failed"
"""Values of a row's `status`."""


def row_path(folder: Path, cell: Cell, config: str, code: str) -> Path:
    """Return the file of a cell under a configuration and a code hash."""
    return folder / f"{cell.name}.{config}.{code}.json"


def write_row(path: Path, row: Row) -> None:
    """Write a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


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
