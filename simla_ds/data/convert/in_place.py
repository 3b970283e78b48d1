"""Shards that are there already, checked and indexed where they are: nothing in them is touched."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simla_ds.data.convert.cleaning import require_libraries
from simla_ds.data.convert.img2dataset import downloads, rows_of
from simla_ds.data.convert.pictures import Judge
from simla_ds.data.convert.processes import available_cores, in_order
from simla_ds.data.convert.rows import TarRow
from simla_ds.data.convert.settings import Settings
from simla_ds.data.convert.writer import (
    DROPPED,
    MANIFEST,
    ShardRecord,
    shown,
    totals,
    without_duplicates,
    write_dropped,
    write_json,
)
from simla_ds.data.shards import SelectionOutdated, Shard, find_shards, index_tar, open_shard, store_selection


def check_in_place(
    shards: str, settings: Settings | None = None, *, workers: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Judge every sample of the tars, keep an index of the good ones beside each, and return the manifest.

    The record of a tar is kept with its index, so a stopped run goes on at the first tar without one, and a tar that
    has changed since is judged again. Writes manifest.json and dropped.jsonl beside the tars. Raises ValueError when
    asked to change samples, OSError where the folder cannot be written.
    """
    settings = settings or Settings()
    require_libraries(settings)
    for option, changes in (("--shorter-side", settings.shorter_side), ("--captions", settings.captions != "as-is")):
        if changes:
            raise ValueError(f"{option} changes the samples, which needs new shards: name a folder with --out")
    paths = find_shards(shards, "--shards")
    known = {path: _stored_record(path, settings) for path in paths}
    todo = [path for path in paths if known[path] is None]
    before = [record for record in known.values() if record is not None]
    for path, record in _judged(todo, before, settings, workers or available_cores(), progress):
        known[path] = record
    records = [record for record in known.values() if record is not None]
    manifest = {
        "source": "img2dataset",
        "licence": settings.licence,
        "options": {"shards": shards},
        "settings": settings.as_json(),
        "rows": sum(record.end for record in records),
        **totals(records),
        "downloads": downloads(shards),
        "shards": {Path(path).name: record.kept for path, record in known.items() if record is not None},
    }
    folder = Path(paths[0]).parent
    write_dropped(folder / DROPPED, records)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _judged(
    paths: list[str], before: list[ShardRecord], settings: Settings, workers: int, progress: bool
) -> Iterator[tuple[str, ShardRecord]]:
    """Judge the samples of these tars; store each tar's index and yield its record when its last one is judged."""
    under_way: deque[Shard] = deque()

    def rows() -> Iterator[TarRow]:
        for path in paths:
            under_way.append(index_tar(path))
            yield from rows_of(under_way[-1])

    total = sum(len(index) + bool(index.problem) for index in map(index_tar, paths))
    todo = in_order(Judge(settings, content=False), rows(), workers)
    outcomes = shown(without_duplicates(todo, settings, before, workers), total, 0, progress)
    chosen: list[int] = []
    record = ShardRecord()
    for outcome in outcomes:
        if not outcome.reason:
            chosen.append(record.end)
        record.count(record.end, outcome)
        shard = under_way[0]
        if record.end == len(shard) + bool(shard.problem):
            note = {"settings": settings.as_json(), "record": asdict(record)}
            store_selection(shard, chosen, json.dumps(note))
            yield shard.path, record
            under_way.popleft()
            chosen, record = [], ShardRecord()


def _stored_record(path: str, settings: Settings) -> ShardRecord | None:
    """The record of an earlier check with these settings, if the tar is still the same."""
    try:
        note = open_shard(path).note
    except SelectionOutdated:
        return None
    stored = json.loads(note) if note.startswith("{") else {}
    return ShardRecord(**stored["record"]) if stored.get("settings") == settings.as_json() else None
