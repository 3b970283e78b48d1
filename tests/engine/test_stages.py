"""What must not depend on how the work is split: ZeRO stage, ranks, accumulation. Through the real launcher, on CPU."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simla_ds.engine.checkpoint_folder import check_whole, read_state
from tests.engine.launching import ROOT, fit_all
from tests.engine.runs import keys, losses, records, scenes

pytestmark = pytest.mark.launcher

STEPS = 8
EVERY = 2
"""Steps between checkpoints. Resumed at the first, six steps are left to compare."""
STAGES = [f"zero{stage}" for stage in range(4)]
COMMON = ["--train.steps", str(STEPS), "--model.stream.dropout", "0", "--objectives.itm.negatives", "global"]
COMMON += ["--train.checkpoint_every", str(EVERY), "--train.keep_checkpoints", "9", "--eval.every", str(STEPS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data"))


# for MLM, XMM and PSL alone: contrast sees the micro-batch only
ACCUMULATION = {"whole": ("8", "1"), "halves": ("4", "2")}
UNCONTRASTED = ["--objectives.itc.weight", "0", "--objectives.itm.weight", "0"]


def under(stage: str, *arguments: str) -> list[str]:
    return [*COMMON, *arguments, "--deepspeed", str(ROOT / "ds_configs" / f"{stage}.json")]


def fit(data: Path, runs: dict[Path, list[str]], ranks: int) -> str:
    """Train each run folder with its arguments, all in one launch; return what was said."""
    return fit_all({run: keys(data, *arguments) for run, arguments in runs.items()}, ranks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data):
    """Run folders: every stage at one and at two ranks with the same global batch of 8, and accumulation's two."""
    out = tmp_path_factory.mktemp("stages")
    runs = {ranks: {} for ranks in (1, 2)}
    for stage, ranks in itertools.product(STAGES, runs):
        runs[ranks][out / str(ranks) / stage] = under(stage, "--train.batch_size", str(8 // ranks))
    for name, (batch, steps) in ACCUMULATION.items():
        split = ["--train.batch_size", batch, "--train.grad_accumulation", steps]
        runs[1][out / "1" / name] = under("zero2", *UNCONTRASTED, *split)
    for ranks, planned in runs.items():
        fit(data, planned, ranks)
    return {(run.name, ranks): run for ranks, planned in runs.items() for run in planned}


@pytest.fixture(scope="module")
def runs(folders):
    return {which: losses(folder) for which, folder in folders.items()}


def relative_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() == set(range(1, STEPS + 1))
    assert all(math.isfinite(value) for step in a.values() for value in step.values())
    return max(abs(a[s][name] - b[s][name]) / abs(b[s][name]) for s in a for name in a[s])


def test_these_steps_move_the_losses(runs):
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


def resume(folder: Path, data: Path, checkpoint: Path, ranks: int, stages: list[str]) -> dict[str, Path]:
    """Go on from a checkpoint under each stage in turn; return the run folders."""
    arguments = ["--train.batch_size", str(8 // ranks), "--resume", str(checkpoint)]
    said = fit(data, {folder / stage: under(stage, *arguments) for stage in stages}, ranks)
    assert said.count("resumed from") == len(stages)
    assert f"goes on at pair {8 * read_state(checkpoint)['step']}" in said
    return {stage: folder / stage for stage in stages}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, data, folders):
    """Two ranks under ZeRO-2, then one rank under each stage, then two ranks again; and where each began."""
    tmp, begun = tmp_path_factory.mktemp("resumed"), folders["zero2", 2] / "checkpoints" / "step_00000002"
    alone = resume(tmp / "alone", data, begun, 1, ["zero3", "zero1", "zero0", "zero2"])
    again = resume(tmp / "again", data, alone["zero3"] / "checkpoints" / "step_00000004", 2, ["zero1", "zero0"])
    runs = {("alone", stage): (folder, 2) for stage, folder in alone.items()}
    return runs | {("again", stage): (folder, 4) for stage, folder in again.items()}


RESUMED = [("alone", stage) for stage in ("zero3", "zero1", "zero0", "zero2")] + [
    ("again", "zero1"),
    ("again", "zero0"),
]


@pytest.mark.parametrize("which", RESUMED, ids="-".join)
def test_a_run_goes_on_at_another_number_of_ranks_and_stage(folders, runs, resumed, which):
    folder, begun = resumed[which]
    undisturbed = {step: values for step, values in runs["zero2", 2].items() if step > begun}
    after = losses(folder)
    assert list(after) == list(range(begun + 1, STEPS + 1))
    assert max(abs(after[s][name] / undisturbed[s][name] - 1) for s in after for name in after[s]) < 1e-5
    ends = [run / "checkpoints" / f"step_{STEPS:08d}" for run in (folder, folders["zero2", 2])]
    check_whole(ends[0])
    queues = [load_file(end / "queue.safetensors") for end in ends]
    for name in ("image_id", "pointer", "filled"):
        assert torch.equal(queues[0][name], queues[1][name])
    torch.testing.assert_close(queues[0]["image"], queues[1]["image"], rtol=0, atol=1e-5)
    assert read_state(ends[0])["data"]["next"][0] == read_state(ends[1])["data"]["next"][0] == 8 * STEPS


def test_two_micro_steps_equal_one_of_twice_the_batch(runs):
    whole, halves = (runs[name, 1] for name in ACCUMULATION)
    assert set(whole[1]) == {"loss", "loss/mlm", "loss/xmm", "loss/psl"}
    assert relative_difference(halves, whole) < 1e-5
