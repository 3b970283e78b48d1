"""What must not depend on how the work is split: ZeRO stage, ranks, accumulation. Through the real launcher, on CPU."""

import math

import pytest

from tests.engine.launching import ROOT, launch
from tests.engine.runs import keys, losses, records, scenes

pytestmark = pytest.mark.launcher

STEPS = 6
STAGES = [f"zero{stage}" for stage in range(4)]
FILES = ",".join(str(ROOT / "ds_configs" / f"{stage}.json") for stage in STAGES)
COMMON = ["--train.steps", str(STEPS), "--model.stream.dropout", "0", "--objectives.itm.negatives", "global"]
COMMON += ["--train.checkpoint_every", "0", "--eval.every", str(STEPS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data):
    """Run folders of every stage at one and at two ranks, with the same global batch of 8."""
    out = tmp_path_factory.mktemp("stages")
    for ranks in (1, 2):
        arguments = keys(data, *COMMON, "--train.batch_size", str(8 // ranks))
        done = launch("tests.engine.workers.stages", f"{out}/{ranks}", FILES, *arguments, ranks=ranks, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return {(stage, ranks): out / str(ranks) / stage for stage in STAGES for ranks in (1, 2)}


@pytest.fixture(scope="module")
def runs(folders):
    return {which: losses(folder) for which, folder in folders.items()}


def relative_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() == set(range(1, STEPS + 1))
    assert all(math.isfinite(value) for step in a.values() for value in step.values())
    return max(abs(a[s][name] - b[s][name]) / abs(b[s][name]) for s in a for name in a[s])


def test_six_steps_move_the_losses(runs):
    """Without this the comparisons below could hold for a run that does nothing."""
    first, last = runs["zero0", 1][1], runs["zero0", 1][STEPS]
    assert set(first) == {"loss", "loss/itc", "loss/itm", "loss/mlm", "loss/xmm", "loss/psl"}
    assert all(abs(first[name] - last[name]) / first[name] > 1e-4 for name in first)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_has_the_losses_of_stage_0(runs, stage, ranks):
    assert relative_difference(runs[stage, ranks], runs["zero0", ranks]) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_losses_of_one_at_the_same_global_batch(runs, stage):
    assert relative_difference(runs[stage, 2], runs[stage, 1]) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_held_out_measures_do_not_depend_on_stage_or_ranks(folders, stage, ranks):
    """At stage 3 they are taken on a gathered copy of the student."""

    def measured(which):
        lines = [record for record in records(folders[which]) if "eval/student/loss/itc" in record]
        return [{name: value for name, value in line.items() if "/loss/" in name} for line in lines]

    found, wanted = measured((stage, ranks)), measured(("zero0", 1))
    assert len(found) == len(wanted) == 2  # before the first step and after the last
    assert found[0]["eval/student/loss/mlm"] != found[1]["eval/student/loss/mlm"]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_two_micro_steps_equal_one_of_twice_the_batch(tmp_path, data):
    """For MLM, XMM and PSL: contrast sees the micro-batch only."""
    only = [*COMMON, "--objectives.itc.weight", "0", "--objectives.itm.weight", "0"]
    for name, batch, accumulation in (("whole", "8", "1"), ("halves", "4", "2")):
        arguments = keys(data, *only, "--train.batch_size", batch, "--train.grad_accumulation", accumulation)
        file = str(ROOT / "ds_configs" / "zero2.json")
        done = launch("tests.engine.workers.stages", f"{tmp_path}/{name}", file, *arguments, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, halves = losses(tmp_path / "whole" / "zero2"), losses(tmp_path / "halves" / "zero2")
    assert set(whole[1]) == {"loss", "loss/mlm", "loss/xmm", "loss/psl"}
    assert relative_difference(halves, whole) < 1e-5
