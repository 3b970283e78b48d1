"""Bytes that a rank sends in a step, counted at c10d, against the plan's."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.communication import RANKS, STAGES, Sent, table
from benchmarks.launching import launch
from tests.engine.runs import scenes


def test_a_ring_of_one_sends_nothing_and_of_four_three_quarters(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for ranks, share in ((1, 0.0), (4, 0.75)):
            with Sent(ranks) as sent:
                dist.all_reduce(torch.ones(1000))
                dist.all_gather([torch.empty(500)], torch.ones(500))
                dist.broadcast(torch.ones(10), 0)
            found = {kind.split()[0]: number for kind, number in sent.bytes.items()}
            assert found == {"gradients": 8000 * share, "gathered": 2000 * share, "broadcast": 40 * share}
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("ranks", RANKS)
def test_a_step_sends_what_the_plan_says(tmp_path: Path, ranks: int):
    out = tmp_path / "found.json"
    launch("benchmarks.communication", ranks, str(scenes(tmp_path)), str(out), "1")
    content = json.loads(out.read_text())
    found, where = content["stages"], content["environment"]
    assert (where["device"], where["threads"]) == ("cpu", int(os.environ["OMP_NUM_THREADS"]))
    for stage, one in found.items():
        counted, planned = sum(one["sent"].values()), sum(one["planned"].values())
        assert counted == pytest.approx(planned, rel=0.05), (stage, one)


def test_the_table_compares_stages_and_ranks():
    one = {"sent": {"gathered": 2_000_000}, "planned": {"weights": 1_000_000}}
    found = {
        str(ranks): {str(stage): {**one, "seconds": [ranks * (stage + 1.0)]} for stage in STAGES} for ranks in RANKS
    }
    lines = list(table(found))
    assert "| ZeRO-3 | 2 | 2.00: gathered 2.00 | 1.00: weights 1.00 | 8.000 | 0.25 |" in lines
    assert lines[-1].endswith("ZeRO-0: 1.00.")
