"""The report, on made-up rows of a small grid."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.data_efficiency.command import main
from benchmarks.data_efficiency.grid import read_grid
from benchmarks.data_efficiency.headlines import headlines
from benchmarks.data_efficiency.plots import draw_needed
from benchmarks.data_efficiency.sets import merged

GRID = {
    "name": "made-up",
    "about": "Rows of a test.",
    "config": {},
    "data": {"scenes": {"train": 1000}},
    "measure": {"splits": ["test"]},
    "cells": [{"objectives": ["itc", "simla"], "fractions": [0.1, 1.0], "seeds": [0, 1, 2]}],
    "sentences": [["simla", "itc"]],
}
BETTER = {"simla": 8.0, "itc": 0.0}
MACHINE = {"processor": "a CPU", "ranks": 1, "threads": 1, "device": "cpu", "torch": "2"}


CONFIG = {
    "train": {"seed": 0, "precision": "fp32", "batch_size": 16, "grad_accumulation": 1},
    "optim": {"learning_rate": 0.002},
    "teacher": {"momentum": 0.95},
    "objectives": {"itc": {"queue_size": 0}, "alpha": 0.4, "alpha_ramp_samples": 4000},
}


def row(grid_hash: str, group: str, fraction: float, seed: int) -> dict[str, Any]:
    score = 20 * fraction + BETTER[group] + 0.5 * seed + (0.3 * seed if group == "itc" else 0)
    shown = headlines(rerank=8)
    chances = {name: 1.7 for one in shown.values() for name in (one.chance, one.oracle) if name and "itm" not in name}
    ways = [f"retrieval/itm/{way}/r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    recalls = {name: {"1": 10.0, "5": 20.0, "0": 90.0}[name[-1]] for name in ways}
    numbers = {**dict.fromkeys(shown, score), **chances, "retrieval/ceiling/mean_recall": 99.5, **recalls}
    numbers["retrieval/captions"] = 300.0
    kept = {f"test/{name}": value for name, value in numbers.items() if group == "simla" or "/itm/" not in name}
    return {
        "cell": f"{group}-{fraction:g}-{seed}",
        "group": group,
        "fraction": fraction,
        "seed": seed,
        "status": "done",
        "pairs": int(1000 * fraction),
        "pairs_seen": 2000,
        "gflop": 10.0 if group == "itc" else 40.0,
        "seconds": 3.0,
        "cpu_seconds": 2.0 + seed,
        "measure_cpu_seconds": 1.0,
        "metrics": {"student": kept, "teacher": kept},
        "gradient_share": {"image_cls/itc": 0.75},
        "commit": "abc",
        "code_hash": "code",
        "grid_hash": grid_hash,
        "data_hash": "data",
        "config_hash": "config",
        "config": merged(CONFIG, {"train": {"seed": seed}}),
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


def test_only_the_primary_family_gets_verdicts_and_one_seed_none(files: tuple[Path, Path]):
    said = report(*files)
    found = next(line for line in said.splitlines() if line.startswith("- mean recall, ITC at 100%, simla against itc"))
    # differences 8, 7.7 and 7.4; the p of the t test is .00051, Holm's twice that: two comparisons are planned
    assert found.endswith(
        ": +7.7 (95% interval +7.0 to +8.4, 3 seeds), at 4.00 times the training GFLOP: significant (Holm's p 0.001)."
    )
    one = "mean recall, ITC at 10%, simla against itc: +8.0 in one seed, without an interval"
    assert f"{one}, at 4.00 times the training GFLOP: nothing can be said." in said
    other = next(line for line in said.splitlines() if line.startswith("- keyword AP, ITC at 100%, simla against itc"))
    assert other.endswith("3 seeds), at 4.00 times the training GFLOP.")
    assert "R@5, ITM at 100%, simla against itc" not in said  # itc trains no matching
    assert "3 seeds at 100% would show to be significant with a power of 80%" in said


def test_a_mean_by_itm_is_of_the_depths_that_it_decides_whatever_the_row_holds(files: tuple[Path, Path]):
    lines = report(*files).splitlines()
    table = lines[lines.index("## test at 100%, student, %") :]
    column = table[2].split(" | ").index("mean of R@1, R@5, ITM")
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[column] for line in table[4:8]}
    # 10 and 20: R@10 is ITC's own order; chance is 1 and 5 of 300
    assert cells == {"itc": "-", "simla": "15.0 ± 0.0", "chance": "1.0", "oracle, fitted to the test": "-"}


def test_the_conditions_are_those_of_the_rows(files: tuple[Path, Path]):
    said = report(*files)
    assert "trained on cpu in precision fp32, 16 pairs a step, 2,000 pairs in all: 20 passes over 10%, 2 passes" in said
    assert "the step's own pairs and a queue of 0 at 10%, 0 at 100%" in said
    assert "to 0.2 at the end, of the 0.4 that it would have after 4,000 pairs" in said
    assert "learning rate: 0.002\n" in said
    assert "are measured on the same test pictures" in said


def test_rows_of_a_tree_with_changes_are_marked(files: tuple[Path, Path]):
    assert "uncommitted" not in report(*files)
    for name in ("simla-1-0", "itc-1-2"):
        file = files[1] / f"{name}.config.code.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "commit": "abc-dirty"}))
    assert "no commit gives these numbers again: itc-1-2, simla-1-0" in report(*files)


def test_cells_that_failed_or_are_missing_are_said_and_left_out_of_the_means(files: tuple[Path, Path]):
    said = report(*files)
    assert "12 cells: 10 done, 1 failed, 1 open" in said
    assert "failed, left out of every mean: itc-0.1-1" in said
    assert (
        "| itc | 2.8 ± 0.8 (2 of 3) | 20.8 ± 0.5 |" in said
    )  # 2, 3.6; the failed 2.8 would change neither, but 3 of 3
    assert "| simla | 10.2 ± 0.2 (2 of 3) | 28.5 ± 0.3 |" in said


def test_the_page_has_the_plots_the_tables_and_what_others_need(files: tuple[Path, Path]):
    file, folder = files
    missing = read_grid(file)
    for cell in missing.all_cells:
        content = json.dumps(row(missing.shared_hash, cell.group, cell.fraction, cell.seed))
        (folder / f"{cell.name}.config.code.json").write_text(content)
    said = report(file, folder)
    page = (folder / "report.html").read_text()
    for name in ("score_by_pairs.png", "score_by_gflop.png", "score_by_seconds.png", "pairs_needed.png"):
        assert f'<img src="{name}"' in page
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "| itc | 1 | not reached in 3 of 3 seeds |" in said
    assert page.count("<table>") == said.count("| --- |")
    assert "| itc | 2,000 | 10 | 3 | 3 (2 to 4) | 1 |" in said  # what a cell costs, with its spread


def test_one_seed_says_nothing_of_pairs_needed(files: tuple[Path, Path]):
    assert "Share of all pairs needed" not in report(*files)  # both sets have but seed 0 at every fraction
    assert not (files[1] / "pairs_needed.png").exists()


def test_pairs_needed_are_drawn_up_to_the_highest_score_whatever_its_rounding(tmp_path: Path):
    low, high = 9.1, 31.8
    assert low + (high - low) > high
    a, b = [(10, low), (100, high)], [(10, 0.1), (100, 40.0)]
    curves = {"a": {0: a, 1: a}, "b": {0: b, 1: b}}
    assert draw_needed(curves, [("a", "b"), ("b", "a")], "score", tmp_path) == ["pairs_needed.png"]
    assert draw_needed({**curves, "b": {0: b}}, [("a", "b")], "score", tmp_path) == []  # one seed in common
    above = [(10, 50.0), (100, 60.0)]
    assert draw_needed({**curves, "b": {0: above, 1: above}}, [("a", "b")], "score", tmp_path) == []


def test_without_a_finished_row_there_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    assert main(["--grid", str(tmp_path / "grid.yaml"), "--report", "--results", str(tmp_path)]) == 2
    assert "no rows of configuration" in capsys.readouterr().err


def test_a_file_that_is_no_row_is_named(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    (files[1] / "simla-1-0.config.code.json").write_text("{")
    assert main(["--grid", str(files[0]), "--report", "--results", str(files[1].parent)]) == 2
    assert "simla-1-0.config.code.json is no row" in capsys.readouterr().err
