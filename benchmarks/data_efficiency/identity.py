"""Which code and which configuration a row is of, so that rows of different ones are never averaged."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEPENDS_ON = (
    "launch/pretrain.py",
    *(f"benchmarks/data_efficiency/{name}.py" for name in ("cell", "data", "measures", "cost")),
)
"""What runs a cell, chooses its data, measures and counts; with all of this project that they import. What a grid
file says is part of the configuration instead."""
CHANGES_NO_ROW = "benchmarks.data_efficiency.command"
"""Imported by the package's __init__.py, and so the report."""


@cache
def code_files() -> tuple[Path, ...]:
    """Return the project's source files that a cell depends on, imports inside functions included."""
    finder = ModuleFinder(path=[str(ROOT), str(ROOT / "kernels")], excludes=[CHANGES_NO_ROW])
    for file in DEPENDS_ON:
        finder.run_script(str(ROOT / file))
    found = {getattr(module, "__file__", None) for module in finder.modules.values()} - {None}
    return tuple(sorted({Path(str(file)) for file in found} | {ROOT / file for file in DEPENDS_ON}))


@cache
def code_hash() -> str:
    """Return 12 hex digits that change with any of code_files. Comments and documentation count too."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def config_hash(said: Any) -> str:
    """Return 12 hex digits of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
