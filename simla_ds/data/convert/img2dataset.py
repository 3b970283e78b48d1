"""img2dataset's output in WebDataset form: 00000.tar with KEY.jpg, KEY.txt and KEY.json, 00000_stats.json beside it.

The tars are left as they are: every sample is checked and the index beside each tar names the good ones, so that
training reads no others. With --out they are written anew, resized and cleaned, like every other source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from simla_ds.data.convert.rows import TarRow, read_json
from simla_ds.data.sample import Reason
from simla_ds.data.shards import PICTURES, TEXTS, Shard, find_shards, index_tar


def rows(*, shards: str) -> Iterator[TarRow]:
    """Yield a row per sample, and one for each tar that is damaged."""
    for path in find_shards(shards, "--shards"):
        yield from rows_of(index_tar(path))


def rows_of(shard: Shard) -> Iterator[TarRow]:
    """Yield the samples of one tar, then a row that says what is wrong with it, if anything is."""
    file = Path(shard.path).name
    for number in range(len(shard)):
        known = {name: place for name, place in shard.sample(number).items() if name in (*PICTURES, *TEXTS)}
        yield TarRow(f"{file}:{shard.key(number)}", shard.path, known)
    if shard.problem:
        yield TarRow(file, shard.path, {}, cast(Reason, shard.problem))


def downloads(shards: str) -> dict[str, int]:
    """Sum img2dataset's own counts (of urls, successes, failures) over the *_stats.json beside the tars."""
    total: Counter[str] = Counter()
    for path in find_shards(shards, "--shards"):
        stats = Path(path).with_name(Path(path).stem + "_stats.json")
        if stats.is_file():
            found = read_json(stats)
            total.update({name: found.get(name, 0) for name in ("count", "successes", "failed_to_download")})
    return dict(total)
