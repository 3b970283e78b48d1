"""The history of results: what is compared with what, and what counts as worse."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def environment(date: str, **other: Any) -> dict[str, Any]:
    return {"processor": "a CPU", "device": "cpu", "threads": 1, "torch": "2", "commit": f"c{date}", **other}


def result(date: str, **figures: Any) -> dict[str, Any]:
    return {
        "benchmark": "step",
        "config": "small",
        "precision": "fp32",
        "clock": "wall",
        "date": date,
        "environment": environment(date),
        "ratio_vs_official_order": 1.5,
        "useful_share_of_gemm": 0.5,
        "saved_bytes": 1000,
        "saved_bytes_checkpointed": 100,
        "saved_bytes_of": {"ours": 1000, "official order": 2000},
        "peak_memory_mb": 50.0,
        "contenders": {"ours": {"median_seconds": 1.0}, "official order": {"median_seconds": 1.5}},
        **figures,
    }


def store(folder: Path, *results: dict[str, Any]) -> None:
    for number, content in enumerate(results):
        (folder / f"{9 - number}.json").write_text(json.dumps(content))  # newest first by name: dates decide


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({"ratio_vs_official_order": 1.3}, "ratio_vs_official_order was 1.5 (c1), is 1.3 (c2)"),
        ({"ratio_vs_official_order": 1.4}, None),
        ({"ratio_vs_official_order": 2.0}, None),
        ({"saved_bytes": 1020}, "saved_bytes was 1000 (c1), is 1020 (c2)"),
        ({"saved_bytes": 500}, None),
        ({"useful_share_of_gemm": None}, "useful_share_of_gemm was 0.5 (c1), is not measured (c2)"),
        ({"objections": ["the baseline is 2.00 times slower than published"]}, "the baseline is 2.00 times slower"),
    ],
)
def test_the_newest_is_held_against_what_was_before(tmp_path: Path, capsys: Any, change: dict, worse: str | None):
    store(tmp_path, result("1"), result("2", **change))
    status = report.main(["--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == (1 if worse else 0)
    assert (worse or "nothing got worse") in printed


@pytest.mark.parametrize(
    "other",
    [
        {"clock": "cpu"},
        *({"environment": environment("2", **one)} for one in ({"device": "a card"}, {"threads": 2}, {"torch": "3"})),
    ],
)
def test_other_machines_clocks_threads_and_versions_are_not_compared(tmp_path: Path, other: dict[str, Any]):
    store(tmp_path, result("1"), result("2", saved_bytes=5000, **other))
    assert report.main(["--results", str(tmp_path)]) == 0


def test_the_best_of_all_before_is_what_counts(tmp_path: Path, capsys: Any):
    ratios = (1.5, 1.7, 1.6, 1.5)  # each within the slack of the one before it
    store(tmp_path, *(result(str(n), ratio_vs_official_order=ratio) for n, ratio in enumerate(ratios)))
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "ratio_vs_official_order was 1.7 (c1), is 1.5 (c3)" in capsys.readouterr().out


def test_kinds_of_pictures_are_each_held_against_their_own_past(tmp_path: Path, capsys: Any):
    def data(date: str, **ratios: float) -> dict[str, Any]:
        found = {size: {"bits_per_pixel": 2.0, "ratio_vs_pil_torchvision": ratio} for size, ratio in ratios.items()}
        return {"benchmark": "data", "date": date, "environment": environment(date), "pictures": found}

    store(tmp_path, result("0"), data("1", small=1.8, large=4.0), data("2", small=1.7, large=3.0))
    assert report.main(["--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("REGRESSION") == 1
    assert (
        "REGRESSION data, large, a CPU, cpu, 1 thread(s), torch 2: ratio_vs_pil_torchvision was 4 (c1), is 3 (c2)"
        in printed
    )


def test_it_draws(tmp_path: Path):
    points = [{"value": v, "gflop": v, "saved_mb": v, "seconds": v} for v in (1, 2, 4)]
    growth = {"benchmark": "growth", "date": "3", "curves": [{"setting": "batch", "points": points}]}
    store(tmp_path, result("1"), growth)
    report.main(["--results", str(tmp_path), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_folder_without_results_and_a_broken_file_are_refused(tmp_path: Path, capsys: Any):
    assert report.main(["--results", str(tmp_path)]) == 2
    (tmp_path / "broken.json").write_text("{")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "broken.json is no JSON" in capsys.readouterr().err
