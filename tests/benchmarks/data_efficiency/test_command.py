"""Cells through the real launcher: run once, repeated exactly, marked when they fail."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.data_efficiency.command import main
from benchmarks.data_efficiency.sets import merged

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {
    "model": {
        "vision": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "heads": 2},
        "stream": {"layers": 2, "text_layers": 1, "fusion_layers": 1, "width": 32, "heads": 2, "intermediate_size": 64},
    },
    "data": {"workers": 0},
    "train": {"samples": 24, "batch_size": 8, "checkpoint_every": 0, "diagnose_every": 2, "log_every": 1},
    "eval": {"every": 0},
}
SCENES = {"train": 40, "size": 64, "grid": 4, "codebook_size": 8, "vocabulary_size": 600, "workers": 1}
GRID = {
    "name": "tiny",
    "config": CONFIG,
    "data": {"scenes": {**SCENES, "splits": {"test": 20}}},
    "measure": {"splits": ["test"], "pictures": 20, "rerank": 4},
    "cells": [{"objectives": ["simla"], "fractions": [0.5], "seeds": [0]}],
}
pytestmark = pytest.mark.launcher


class Folder:
    """A grid file and the folders of its runs and rows."""

    def __init__(self, folder: Path, **changes: Any):
        self.file, self.folder = folder / "grid.yaml", folder
        self.file.write_text(yaml.safe_dump(merged(GRID, changes)))

    def run(self, *more: str) -> int:
        places = ["--results", str(self.folder / "rows"), "--work", str(self.folder / "work")]
        return main(["--grid", str(self.file), *places, *more])

    def rows(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in (self.folder / "rows" / "tiny").glob("*.json")]
        return {row["cell"]: row for row in found}


@pytest.mark.slow
def test_a_cell_is_trained_by_the_launcher_measured_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    grid = Folder(tmp_path)
    assert grid.run() == 0
    (row,) = grid.rows().values()
    assert (row["status"], row["pairs"], row["pairs_seen"], row["steps"]) == ("done", 20, 24, 3)
    assert row["gflop"] > 0
    assert {"student", "teacher"} == row["metrics"].keys()
    for name in ("retrieval/itc/mean_recall", "retrieval/itm/mean_recall", "grounding/pointing", "swaps/itm/relation"):
        assert 0 <= row["metrics"]["teacher"][f"test/{name}"] <= 100
    assert row["metrics"]["student"]["test/keywords/psl/average_precision"] > 0
    assert sum(v for name, v in row["gradient_share"].items() if name.startswith("image_cls/")) == pytest.approx(1)
    written = (tmp_path / "rows" / "tiny").stat().st_mtime_ns
    capsys.readouterr()
    assert grid.run() == 0
    assert (tmp_path / "rows" / "tiny").stat().st_mtime_ns == written
    assert "simla-0.5-0" in capsys.readouterr().out


@pytest.mark.slow
def test_a_repeated_cell_gives_the_same_numbers_and_a_changed_row_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    grid = Folder(tmp_path, cells=[{"objectives": ["albef"], "fractions": [1.0], "seeds": [0]}])
    assert grid.run("--cell", "albef-1-0") == 0
    assert grid.run("--cell", "albef-1-0") == 0
    assert "the same numbers as" in capsys.readouterr().out
    (file,) = (tmp_path / "rows" / "tiny").glob("*.json")
    row = json.loads(file.read_text())
    row["losses"]["itc"] += 1e-6
    file.write_text(json.dumps(row))
    assert grid.run("--cell", "albef-1-0") == 1
    assert "losses differ from" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_cell_is_marked_and_run_again_only_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grid = Folder(tmp_path, cells=[{"objectives": ["itc"], "fractions": [0.1, 1.0], "seeds": [0]}])  # 4 pairs: too few
    assert grid.run() == 1
    rows = grid.rows()
    assert {name: row["status"] for name, row in rows.items()} == {"itc-0.1-0": "failed", "itc-1-0": "done"}
    assert "holds 4 samples, fewer than one batch of 8" in rows["itc-0.1-0"]["error"]
    assert grid.run() == 1
    assert grid.rows() == rows
    assert "1 cell(s) failed; --retry runs them again" in capsys.readouterr().err
    assert grid.run("--retry") == 1
    assert grid.rows()["itc-0.1-0"]["date"] > rows["itc-0.1-0"]["date"]
    assert grid.rows()["itc-1-0"] == rows["itc-1-0"]


@pytest.mark.slow
def test_a_smoke_run_trains_and_measures_every_set_of_the_grid_that_is_shipped(tmp_path: Path):
    shipped = ROOT / "grids" / "scenes.yaml"
    assert main(["--grid", str(shipped), "--smoke", "--work", str(tmp_path)]) == 0
    rows = [json.loads(path.read_text()) for path in (tmp_path / "scenes-smoke").glob("*.json")]
    assert {row["group"] for row in rows if row["status"] == "done"} >= {"itc", "albef", "simla", "simla.official"}
    assert len(rows) == 7


@pytest.mark.slow
def test_an_interrupted_grid_leaves_no_process_and_no_row_and_goes_on(tmp_path: Path):
    grid = Folder(tmp_path)
    places = ["--results", str(tmp_path / "rows"), "--work", str(tmp_path / "work")]
    command = [sys.executable, "-m", "benchmarks", "data_efficiency", "--grid", str(grid.file), *places]
    process = subprocess.Popen(command, cwd=ROOT)
    log = tmp_path / "work" / "tiny" / "cells" / "simla-0.5-0" / "train.log"
    while not (log.is_file() and "pretrain.py" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 60  # the ranks save and leave
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert grid.rows() == {}
    assert grid.run() == 0
    assert [row["status"] for row in grid.rows().values()] == ["done"]
