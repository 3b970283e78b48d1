"""Look through shards and write down what they hold."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simla_ds.config import DataConfig, TrainConfig
from simla_ds.data.convert.img2dataset import rows_of
from simla_ds.data.convert.processes import available_cores, in_order
from simla_ds.data.convert.rows import TarRow
from simla_ds.data.convert.writer import shown, write_json
from simla_ds.data.inspection.look import Look
from simla_ds.data.inspection.page import contact_sheet, lines, page
from simla_ds.data.inspection.summary import Summary, quantiles
from simla_ds.data.shards import Shard, find_shards, open_shard
from simla_ds.data.text import TextTokenizer

ON_SHEET = 36
"""Pictures of the contact sheet."""
MANY = 0.01
"""Share of bad samples or repeated pictures that is worth a word."""


def inspect_shards(
    spec: str,
    *,
    out: Path | None = None,
    tokenizer: Path | None = None,
    batch_size: int = TrainConfig.batch_size,
    limit: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Look at every sample as training would and return the report; "stops" lists what training would end on.

    out: folder for index.html, contact_sheet.png and report.json. tokenizer: folder (None: `tokenizer` beside the
    shards' folder, if there is one). limit: look at so many samples, evenly spread (0: all). batch_size: of all ranks.
    Raises ValueError when there are no shards or the tokenizer cannot be read.
    """
    paths = find_shards(spec, "SHARDS")
    shards = [open_shard(path) for path in paths]
    tokenizer = tokenizer or _beside(paths[0])
    if tokenizer:
        TextTokenizer(tokenizer)  # says now, not in a worker, that it can't be read
    look = Look(DataConfig.max_words, str(tokenizer or ""))
    total = sum(map(len, shards))
    findings = in_order(look, _chosen(shards, min(limit or total, total)), workers or available_cores())
    summary = Summary()
    for finding in shown(findings, min(limit or total, total), 0, progress):
        summary.add(finding)
    report: dict[str, Any] = {
        "source": spec,
        "looked_at_all": not limit or limit >= total,
        "shards": {
            "count": len(shards),
            "bytes": sum(os.path.getsize(path) for path in paths),
            "samples": quantiles(Counter(map(len, shards))),
            "damaged": {shard.path: shard.problem for shard in shards if shard.problem},
        },
        **summary.report(DataConfig.max_tokens, tokenizer is not None),
    }
    report["stops"] = _stops(report, batch_size)
    report["warnings"] = _warnings(report, tokenizer, batch_size)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        contact_sheet(summary.shown).save(out / "contact_sheet.png")
        (out / "index.html").write_text(page(report, "contact_sheet.png"), encoding="utf-8")
        write_json(out / "report.json", report)
    return report


def run(arguments: Any) -> int:
    """Inspect, print, and return 1 when training would stop on these shards."""
    report = inspect_shards(
        arguments.shards,
        out=arguments.out,
        tokenizer=arguments.tokenizer,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(lines(report)))
    return 1 if report["stops"] else 0


def _chosen(shards: list[Shard], looked: int) -> Iterator[tuple[TarRow, bool]]:
    """Samples to look at, evenly spread, and which of them to show; the row of a damaged shard is always among them."""
    total = sum(map(len, shards))
    every = max(1, looked // ON_SHEET)
    number = taken = 0
    for shard in shards:
        for row in rows_of(shard):
            if row.problem:
                yield row, False
                continue
            if number * looked // total != (number + 1) * looked // total:
                yield row, taken % every == 0 and taken // every < ON_SHEET
                taken += 1
            number += 1


def _beside(path: str) -> Path | None:
    """The tokenizer that training takes by default."""
    folder = Path(path).resolve().parent.parent / "tokenizer"
    return folder if folder.is_dir() else None


def _stops(report: dict[str, Any], batch_size: int) -> list[str]:
    """What PairLoader raises on."""
    usable, samples = report["usable"], report["samples"]
    if not usable:
        return [f"none of {samples} samples is usable"]
    if report["looked_at_all"] and samples < batch_size:
        return [f"{samples} samples are fewer than one batch of {batch_size}; set train.batch_size <= {samples}"]
    return []


def _warnings(report: dict[str, Any], tokenizer: Path | None, batch_size: int) -> list[str]:
    samples, captions, twice = max(1, report["samples"]), report["captions"], report["duplicates"]
    found = []
    if report["looked_at_all"] and report["usable"] < batch_size:
        found.append(f"a batch of {batch_size} will hold some of the {report['usable']} usable samples twice")
    if tokenizer is None:
        found.append("no `tokenizer` beside the shards' folder: captions were not tokenised; name one with --tokenizer")
    if report["samples"] - report["usable"] > MANY * samples:
        found.append(f"{report['samples'] - report['usable']:,} of {samples:,} samples will be passed over")
    if twice["keys"]:
        found.append(f"{twice['keys']:,} keys were there before: those samples count as one among ITC's negatives")
    if twice["pictures"] > MANY * samples:
        found.append(f"{twice['pictures']:,} pictures were there before under another image id: false negatives")
    if captions["tokens"] and captions["cut"] > 0.1 * captions["count"]:
        found.append(f"{captions['cut']:,} of {captions['count']:,} captions are longer than data.max_tokens")
    return found
