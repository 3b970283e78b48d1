"""The common end of every source: rows judged by several processes, written as shards, counted, restartable.

    OUT/shard-000000.tar ...   OUT/shard-000000.tar.index.npz ...   OUT/manifest.json   OUT/dropped.jsonl

All is made in OUT.partial and renamed when whole. A run that was stopped goes on after its last whole shard: beside it
lies a record of the rows it covers, and rows come in the same order each time. Equal input gives equal bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import PIL

from simla_ds import __version__
from simla_ds.data.convert import SOURCES
from simla_ds.data.convert.cleaning import require_libraries
from simla_ds.data.convert.duplicates import DuplicateFilter, Fingerprint
from simla_ds.data.convert.pictures import Judge, Outcome
from simla_ds.data.convert.processes import available_cores, in_order
from simla_ds.data.convert.rows import AnyRow
from simla_ds.data.convert.settings import Settings
from simla_ds.data.shards import ShardWriter, open_shard, shard_name

MANIFEST, DROPPED = "manifest.json", "dropped.jsonl"


@dataclass
class ShardRecord:
    """Which rows a shard covers and what became of them; the next shard starts at row `end`."""

    end: int = 0
    kept: int = 0
    captions: int = 0
    bytes: int = 0
    sha256: str = ""
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    """(row, name, reason)."""
    captions_dropped: dict[str, int] = field(default_factory=dict)
    """Of pictures that are kept, by reason."""
    fingerprints: list[tuple[int, int, int]] = field(default_factory=list)
    """Of the pictures kept, when pictures are compared."""

    def count(self, row: int, outcome: Outcome) -> None:
        """Take note of one row."""
        if outcome.reason:
            self.dropped.append((row, outcome.name, outcome.reason))
        else:
            self.kept += 1
            self.captions += outcome.captions
            self.captions_dropped = dict(Counter(self.captions_dropped) + Counter(outcome.captions_dropped))
            if outcome.fingerprint is not None:
                self.fingerprints.append(outcome.fingerprint)
        self.end = row + 1


def convert(
    source: str,
    options: dict[str, Any],
    out: Path,
    settings: Settings | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a source's rows as shards into the new folder `out` and return the manifest.

    options: keywords of the source's rows(). workers: processes (None: one per core); they change nothing but speed.
    Raises FileExistsError when `out`, or what a stopped run left, was made otherwise; ValueError on unusable input.
    """
    settings = settings or Settings()
    require_libraries(settings)
    rows = importlib.import_module(SOURCES[source]).rows
    identity = identify(source, options, settings, rows(**options))
    if out.exists() and any(out.iterdir()):
        return _same(out / MANIFEST, identity)
    part = out.with_name(out.name + ".partial")
    part.mkdir(parents=True, exist_ok=True)
    with _locked(part):
        stored = part / "identity.json"
        if stored.is_file():
            _same(stored, identity)
        write_json(stored, identity)
        records = _whole_shards(part)
        start = records[-1].end if records else 0
        workers = workers or available_cores()
        todo = in_order(Judge(settings), islice(rows(**options), start, None), workers)
        todo = without_duplicates(todo, settings, records, workers)
        outcomes = shown(enumerate(todo, start), identity["rows"], start, progress)
        records += _write(part, outcomes, settings.shard_size, len(records))
        manifest = _finish(part, identity, records)
        os.replace(part, out)
    return manifest


def identify(source: str, options: dict[str, Any], settings: Settings, rows: Iterable[AnyRow]) -> dict[str, Any]:
    """What decides the bytes written: source, options, settings, and how many rows of which content there are."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
        count += 1
    if not count:
        given = {name: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for name, v in options.items()}
        named = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value)
        raise ValueError(f"{source}: there is not one picture in {named}")
    said = json.loads(json.dumps(options, default=str))  # paths as text, tuples as lists, as it will be read again
    return {
        "source": source,
        "licence": settings.licence,
        "options": said,
        "settings": settings.as_json(),
        "rows": count,
        "rows_hash": digest.hexdigest(),
        "versions": {"simla_ds": __version__, "pillow": PIL.__version__},
    }


def without_duplicates(
    outcomes: Iterator[Outcome], settings: Settings, records: Iterable[ShardRecord], workers: int
) -> Iterator[Outcome]:
    """Pass outcomes on, those of pictures that were there before as dropped. records: of what is written already."""
    if not settings.compares:
        yield from outcomes
        return
    duplicates = DuplicateFilter(settings, workers)
    for record in records:
        for stored in record.fingerprints:
            duplicates.seen.add(Fingerprint(*stored))
    for outcome in outcomes:
        reason = duplicates.judge(outcome.fingerprint) if outcome.fingerprint is not None else ""
        yield Outcome(outcome.name, reason) if reason else outcome


def totals(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Sum what became of all rows: {"kept", "captions", "dropped": {reason: rows}, ...}."""
    records = list(records)
    dropped = Counter(reason for record in records for _, _, reason in record.dropped)
    captions_dropped: Counter[str] = Counter()
    for record in records:
        captions_dropped.update(record.captions_dropped)
    return {
        "kept": sum(record.kept for record in records),
        "captions": sum(record.captions for record in records),
        "dropped": dict(sorted(dropped.items())),
        "captions_dropped": dict(sorted(captions_dropped.items())),
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_dropped(path: Path, records: Iterable[ShardRecord]) -> None:
    """Write a line of JSON per dropped row: its number, its name in the source, the reason."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            for row, name, reason in record.dropped:
                file.write(json.dumps({"row": row, "name": name, "reason": reason}) + "\n")


def shown(items: Iterator[Any], total: int, start: int, progress: bool) -> Iterator[Any]:
    """Pass items on under a progress bar with pictures/s and time left; in a log file, a line every half minute."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    yield from tqdm(
        items,
        total=total,
        initial=start,
        disable=not progress,
        unit=" pictures",
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 30,
    )


def _write(part: Path, outcomes: Iterable[tuple[int, Outcome]], size: int, number: int) -> Iterator[ShardRecord]:
    """Write shards number, number + 1, ... and yield the record of each, stored once the shard is whole."""
    outcomes = iter(outcomes)
    ahead: list[tuple[int, Outcome]] = []  # the row that found the shard full
    while True:
        record, path = ShardRecord(), part / shard_name(number)
        waiting, ahead = ahead, []
        with ShardWriter(path) as shard:
            for row, outcome in chain(waiting, outcomes):
                if outcome.members is not None:
                    if record.kept == size:
                        ahead.append((row, outcome))
                        break
                    shard.add(f"{row:09d}", outcome.members)
                record.count(row, outcome)
        if not record.end:
            path.unlink()
            return
        with open(path, "rb") as file:
            record.sha256, record.bytes = hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
        open_shard(str(path))  # leaves the index beside it
        write_json(_record_path(path), asdict(record))
        yield record
        number += 1
        if not ahead:
            return


def _record_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".record.json")


def _whole_shards(part: Path) -> list[ShardRecord]:
    """Records of the shards that a stopped run finished; whatever else it left is removed."""
    records: list[ShardRecord] = []
    while (path := _record_path(part / shard_name(len(records)))).is_file():
        records.append(ShardRecord(**json.loads(path.read_text(encoding="utf-8"))))
    keep = {shard_name(number) for number in range(len(records))}
    for left in part.iterdir():
        if left.name not in ("identity.json", "lock") and not any(left.name.startswith(name) for name in keep):
            left.unlink()
    return records


def _finish(part: Path, identity: dict[str, Any], records: list[ShardRecord]) -> dict[str, Any]:
    counts = totals(records)
    if records[-1].end != identity["rows"]:
        raise ValueError(f"{identity['source']}: {identity['rows']} rows at first, {records[-1].end} now; start again")
    if not counts["kept"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts["dropped"].items())
        shutil.rmtree(part)  # or the next try would take these verdicts over
        raise ValueError(f"none of {identity['rows']} rows is usable ({reasons}); check the paths and options")
    shards = {
        shard_name(number): {"samples": record.kept, "bytes": record.bytes, "sha256": record.sha256}
        for number, record in enumerate(records)
    }
    manifest = identity | counts | {"shards": shards}
    write_dropped(part / DROPPED, records)
    write_json(part / MANIFEST, manifest)
    for number in range(len(records)):
        _record_path(part / shard_name(number)).unlink()
    (part / "identity.json").unlink()
    (part / "lock").unlink()
    return manifest


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Keep a second run with the same output out."""
    with open(part / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is writing {part}; wait for it or name another folder") from None
        yield


def _same(stored: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored if it was made in the same way. FileExistsError with the first difference otherwise."""
    found = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    for name, wanted in identity.items():
        if found.get(name) != wanted:
            was = f"{name} was {found.get(name)}, is {wanted}" if found else f"it has no {stored.name}"
            raise FileExistsError(f"{stored.parent} was not made by this command ({was}); remove it or name another")
    return found
