"""Rows on disk."""

import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.data_efficiency.rows import read_rows, write_row, write_whole


def test_a_number_that_is_not_finite_makes_no_row(tmp_path: Path):
    row = {"cell": "itc-1-0", "status": "done", "metrics": {"student": {"test/m": math.nan}}, "gflop": math.inf}
    with pytest.raises(ValueError, match=r"itc-1-0 is no result: metrics\.student\.test/m is nan, gflop is inf; lower"):
        write_row(tmp_path / "row.json", row)
    assert list(tmp_path.iterdir()) == []
    write_row(tmp_path / "row.json", {**row, "metrics": {}, "gflop": 1.0})
    assert read_rows(tmp_path) == [{**row, "metrics": {}, "gflop": 1.0}]


def write_many(path: Path) -> None:
    for _ in range(50):
        write_whole(path, "long " * 20_000)


def test_a_file_that_several_write_is_whole_at_every_moment(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    write_whole(path, "long " * 20_000)
    with ProcessPoolExecutor(2) as pool:
        writers = [pool.submit(write_many, path) for _ in range(2)]
        sizes = {path.stat().st_size}
        while not all(writer.done() for writer in writers):
            sizes.add(len(path.read_text()))
        assert [writer.result() for writer in writers] == [None, None]
    assert sizes == {100_000}
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
