"""The history of results: what is compared with what, and what counts as worse."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def result(date: str, **figures: Any) -> dict[str, Any]:
    return {
        "benchmark": "step",
        "config": "small",
        "precision": "fp32",
        "clock": "wall",
        "date": date,
        "environment": {"processor": "a CPU", "commit": f"c{date}"},
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
        ({"useful_share_of_gemm": None}, None),
    ],
)
def test_the_newest_is_held_against_the_one_before(tmp_path: Path, capsys: Any, change: dict, worse: str | None):
    store(tmp_path, result("1"), result("2", **change))
    status = report.main(["--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == (1 if worse else 0)
    assert (worse or "nothing got worse") in printed


def test_other_machines_and_clocks_are_not_compared(tmp_path: Path):
    store(tmp_path, result("1"), result("2", saved_bytes=5000, clock="cpu"))
    assert report.main(["--results", str(tmp_path)]) == 0


def test_kinds_of_pictures_are_each_held_against_their_own_past(tmp_path: Path, capsys: Any):
    def data(date: str, **ratios: float) -> dict[str, Any]:
        found = {size: {"bits_per_pixel": 2.0, "ratio_vs_pil_torchvision": ratio} for size, ratio in ratios.items()}
        environment = {"processor": "a CPU", "commit": f"c{date}"}
        return {"benchmark": "data", "date": date, "environment": environment, "pictures": found}

    store(tmp_path, result("0"), data("1", small=1.8, large=4.0), data("2", small=1.7, large=3.0))
    assert report.main(["--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("REGRESSION") == 1
    assert "REGRESSION data, large, a CPU: ratio_vs_pil_torchvision was 4 (c1), is 3 (c2)" in printed


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
