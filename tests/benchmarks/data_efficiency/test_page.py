"""The report, on made-up rows of a small grid."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.data_efficiency.command import main
from benchmarks.data_efficiency.grid import read_grid
from benchmarks.data_efficiency.page import HEADLINES
from benchmarks.data_efficiency.plots import draw_needed

GRID = {
    "name": "made-up",
    "about": "Rows of a test.",
    "config": {},
    "data": {"scenes": {"train": 1000}},
    "cells": [{"objectives": ["itc", "simla"], "fractions": [0.1, 1.0], "seeds": [0, 1, 2]}],
    "sentences": [["simla", "itc"]],
}
BETTER = {"simla": 8.0, "itc": 0.0}
MACHINE = {"processor": "a CPU", "ranks": 1, "threads": 1, "device": "cpu", "torch": "2"}


def row(grid_hash: str, group: str, fraction: float, seed: int) -> dict[str, Any]:
    score = 20 * fraction + BETTER[group] + 0.5 * seed + (0.3 * seed if group == "itc" else 0)
    chances = {chance: 1.7 for _, chance in HEADLINES.values() if chance}
    numbers = {**dict.fromkeys(HEADLINES, score), **chances, "retrieval/ceiling/mean_recall": 99.5}
    kept = {f"test/{name}": value for name, value in numbers.items() if group == "simla" or "itm" not in name}
    return {
        "cell": f"{group}-{fraction:g}-{seed}",
        "group": group,
        "fraction": fraction,
        "seed": seed,
        "status": "done",
        "pairs": int(1000 * fraction),
        "pairs_seen": 2000,
        "gflop": 10.0,
        "seconds": 3.0,
        "cpu_seconds": 2.0,
        "measure_cpu_seconds": 1.0,
        "metrics": {"student": kept, "teacher": kept},
        "gradient_share": {"image_cls/itc": 0.75},
        "commit": "abc",
        "code_hash": "code",
        "grid_hash": grid_hash,
        "data_hash": "data",
        "config_hash": "config",
        "date": "2026-01-01",
        "environment": MACHINE,
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return a grid file, and the folder of its rows: one failed, one missing."""
    file, folder = tmp_path / "grid.yaml", tmp_path / "results" / "made-up"
    file.write_text(yaml.safe_dump(GRID))
    folder.mkdir(parents=True)
    grid = read_grid(file)
    for cell in grid.all_cells[:-1]:
        content = row(grid.shared_hash, cell.group, cell.fraction, cell.seed)
        if cell.name == "itc-0.1-1":
            content = {**content, "status": "failed", "error": "exit status 1: no room", "metrics": {}}
        (folder / f"{cell.name}.config.code.json").write_text(json.dumps(content))
    return file, folder


def report(file: Path, folder: Path) -> str:
    assert main(["--grid", str(file), "--report", "--results", str(folder.parent)]) == 0
    return (folder / "report.md").read_text()


def test_the_report_says_of_each_comparison_whether_it_is_significant(files: tuple[Path, Path]):
    said = report(*files)
    found = next(line for line in said.splitlines() if line.startswith("- mean recall, ITC at 100%, simla against itc"))
    assert found.endswith(": +7.7 (95% interval +7.0 to +8.4, 3 seeds, detectable 0.9): significant.")
    assert "mean recall, ITC at 10%, simla against itc: +8.0 in one seed: no interval" in said
    assert "mean recall, ITM at 100%, simla against itc" not in said  # itc trains no matching


def test_cells_that_failed_or_are_missing_are_said_and_left_out_of_the_means(files: tuple[Path, Path]):
    said = report(*files)
    assert "12 cells: 10 done, 1 failed, 1 open" in said
    assert "failed, left out of every mean: itc-0.1-1" in said
    assert (
        "| itc | 2.8 ± 0.8 (2 of 3) | 20.8 ± 0.5 |" in said
    )  # 2, 3.6; the failed 2.8 would change neither, but 3 of 3
    assert "| simla | 10.2 ± 0.2 (2 of 3) | 28.5 ± 0.3 |" in said


def test_the_page_has_the_plots_the_tables_and_what_others_need(files: tuple[Path, Path]):
    said = report(*files)
    page = (files[1] / "report.html").read_text()
    for name in ("score_by_pairs.png", "score_by_gflop.png", "score_by_seconds.png", "pairs_needed.png"):
        assert f'<img src="{name}"' in page
        assert (files[1] / name).read_bytes().startswith(b"\x89PNG")
    assert "| itc | 1,000 (100%) | not reached |" in said
    assert page.count("<table>") == said.count("| --- |")


def test_a_row_of_other_code_is_left_out_and_said(files: tuple[Path, Path]):
    file, folder = files
    other = {**row(read_grid(file).shared_hash, "simla", 1.0, 0), "code_hash": "newer", "date": "2027-01-01"}
    other["metrics"]["student"]["test/retrieval/itc/mean_recall"] = 1000.0
    (folder / "simla-1-0.config.newer.json").write_text(json.dumps(other))
    said = report(file, folder)
    assert "1 row(s) of configuration" in said
    assert "| simla | 10.2 ± 0.2 (2 of 3) | 28.5 ± 0.3 |" in said


def test_pairs_needed_are_drawn_up_to_the_highest_score_whatever_its_rounding(tmp_path: Path):
    low, high = 9.1, 31.8
    assert low + (high - low) > high
    curves = {"a": [(10, low), (100, high)], "b": [(10, 0.1), (100, 40.0)]}
    assert draw_needed(curves, [("a", "b"), ("b", "a")], "score", tmp_path) == ["pairs_needed.png"]
    assert draw_needed({**curves, "b": [(10, 50.0), (100, 60.0)]}, [("a", "b")], "score", tmp_path) == []


def test_without_a_finished_row_there_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    assert main(["--grid", str(tmp_path / "grid.yaml"), "--report", "--results", str(tmp_path)]) == 2
    assert "no rows of configuration" in capsys.readouterr().err


def test_a_file_that_is_no_row_is_named(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    (files[1] / "simla-1-0.config.code.json").write_text("{")
    assert main(["--grid", str(files[0]), "--report", "--results", str(files[1].parent)]) == 2
    assert "simla-1-0.config.code.json is no row" in capsys.readouterr().err
