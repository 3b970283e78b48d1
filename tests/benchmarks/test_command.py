"""What the timed benchmarks' command lines refuse alike, and when a run has failed."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import growth, kernels, rerank, step
from benchmarks.command import conclude, new_result


@pytest.mark.parametrize("benchmark", [growth, kernels, rerank, step])
@pytest.mark.parametrize(
    ("argv", "threads", "told"),
    [
        (["--repeats", "0"], 1, "--repeats 0 must be at least 1"),
        (["--device", "cpu", "--clock", "cpu"], 2, "--clock cpu adds up 2 threads' seconds; set OMP_NUM_THREADS=1"),
        (["--device", "cuda"], 1, "--device cuda: torch sees no card; set --device cpu"),
    ],
)
def test_what_cannot_be_timed_so_is_status_2(
    benchmark: ModuleType, argv: list[str], threads: int, told: str, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        benchmark.main(argv)
    assert exit.value.code == 2
    assert told in capsys.readouterr().err


def test_a_cpus_seconds_do_not_tell_a_cards(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        growth.main(["--clock", "cpu"])  # on the card that is there
    assert "--clock cpu does not count what a card computes" in capsys.readouterr().err


def test_a_result_with_objections_is_stored_and_status_1(tmp_path: Path, capsys):
    assert conclude(new_result("step"), "fine", None) == 0
    out = tmp_path / "out.json"
    assert conclude(new_result("step", objections=["it is wrong"]), "bad", out) == 1
    assert json.loads(out.read_text())["objections"] == ["it is wrong"]
    assert "step: error: it is wrong" in capsys.readouterr().err
