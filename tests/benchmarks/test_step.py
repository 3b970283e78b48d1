"""What the step benchmark counts, times and sums up, at a size where it takes a second."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.counting import saved_for_backward
from benchmarks.step_contenders import BUILD, Clock
from benchmarks.step_process import count_bytes, loss_difference, time_step
from benchmarks.step_sizes import SIZES, changed, make_batch

TINY = changed(SIZES["tiny"], model__stream__layers=2)


@pytest.mark.parametrize("name", ["ours", "official order"])
def test_a_step_trains_and_its_parts_make_up_its_time(name: str):
    contender, batch = BUILD[name](TINY, torch.float32), make_batch(TINY)
    before = [p.detach().clone() for p in contender.networks[0].parameters()]
    answer = time_step(contender, batch, Clock(), torch.float32)
    assert any(not torch.equal(p, old) for p, old in zip(contender.networks[0].parameters(), before, strict=True))
    whole = sum(answer["parts"][part] for part in ("forward", "backward", "AdamW", "queue and teacher"))
    assert 0.8 * answer["seconds"] <= whole <= answer["seconds"]


def test_ours_saves_less_than_the_official_order_and_less_still_when_checkpointing():
    batch = make_batch(TINY)
    ours, official = (count_bytes(BUILD[name](TINY, torch.float32), batch) for name in ("ours", "official order"))
    assert ours["saved_bytes"] < 0.6 * official["saved_bytes"]
    assert ours["saved_bytes_checkpointed"] < 0.6 * ours["saved_bytes"]  # two layers: most of it is the heads'


def test_both_orders_have_the_same_losses():
    assert loss_difference(TINY, make_batch(TINY)) < 1e-5


def test_a_storage_counts_once_and_parameters_do_not():
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with saved_for_backward(layer) as saved:
        y = layer(x) * layer(x)  # x once; the two products; the weight not at all
    assert saved[0] == 3 * x.nbytes
    assert y.requires_grad


def answers(seconds: float, operations: float, saved: int) -> list[dict[str, Any]]:
    timed = {"seconds": seconds, "parts": {"forward": seconds}, "peak_memory_mb": 10.0, "gemm_gflops": [100.0, 100.0]}
    counts = {"operations": operations, "computes": ""}
    return [
        {"saved_bytes": saved, "saved_bytes_checkpointed": saved // 10},
        counts,
        timed,
        {**timed, "seconds": 1e3},
        timed,
    ]


def test_ratios_are_of_medians_and_useful_work_is_ours():
    rows = {"ours": answers(2.0, 100e9, 100), "official order": answers(3.0, 240e9, 300), "FLAVA": answers(1.0, 5e9, 7)}
    result = step.summarise(rows, "tiny", pairs=4)
    assert result["ratio_vs_official_order"] == pytest.approx(1.5)
    assert result["ratio_vs_flava"] == pytest.approx(0.5)
    assert result["ratio_vs_official_order_autocast"] is None
    assert result["useful_share_of_gemm"] == pytest.approx(0.5)
    assert (result["saved_bytes"], result["saved_bytes_official_order"]) == (100, 300)
    assert result["times_fewer_saved_bytes_checkpointed"] == pytest.approx(30)
    assert result["contenders"]["ours"]["pairs_per_second"] == pytest.approx(2)


def test_a_baseline_slower_than_published_is_named():
    rows = {
        "ours": answers(2.0, 100e9, 100),
        "official order": answers(9.0, 435e9, 300),
        "FLAVA": answers(2.4, 160e9, 7),
    }
    result = step.summarise(rows, "small", pairs=16)
    result |= {"config": "small", "precision": "fp32", "pairs": 16, "clock": "wall", "note": "", "loss_difference": 0.0}
    result["environment"] = {"processor": "a CPU", "threads": 1, "device": "cpu", "torch": "2"}
    assert result["slower_than_published"]["official order"] == pytest.approx(1.253, abs=1e-3)
    assert "mend it first" in step.describe(result)


@pytest.mark.slow
def test_contenders_take_turns_in_processes_of_their_own(tmp_path: Path):
    out = tmp_path / "step.json"
    assert step.main(["--config", "tiny", "--repeats", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {len(c["seconds"]) for c in result["contenders"].values()} == {2}
    assert result["loss_difference"] < 1e-5


def test_no_repeats_are_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        step.main(["--repeats", "0"])
    assert "--repeats 0 must be at least 1" in capsys.readouterr().err
