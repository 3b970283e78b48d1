"""Runs that are killed, told to stop, or compute nonsense. Through the real launcher, on CPU."""

import json
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from simla_ds.data.loader import PairLoader
from simla_ds.data.text import TextTokenizer
from simla_ds.engine.checkpoint_folder import check_whole
from simla_ds.parsing import parse_config
from tests.engine.launching import ROOT, launch, launching, wait_for
from tests.engine.runs import keys, losses, records, scenes

pytestmark = pytest.mark.launcher

BOUND = 60
"""Seconds within which a run must be over after a signal. The launcher polls once a second and kills after 30."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data"))


def arguments(data: Path, run: Path, ranks: int, steps: int) -> list[str]:
    """Return arguments for steps of 8 pairs in all; one loader process on two ranks, none on one."""
    more = ["--train.steps", str(steps), "--train.checkpoint_every", "2", "--output", str(run)]
    more += ["--train.batch_size", str(8 // ranks), "--data.workers", str(ranks - 1)]
    return keys(data, *more, "--deepspeed", str(ROOT / "ds_configs" / f"zero{ranks}.json"))


def trained_on(run: Path) -> dict[int, list[int]]:
    """Return step -> samples in the history that survived: what was done again counts as it was done last."""
    history: dict[int, dict[int, dict]] = {}
    written = []
    for path in sorted(run.glob("samples_rank*.jsonl")):
        lines = path.read_text().splitlines()
        written += [(number, int(path.stem[-1]), json.loads(line)) for number, line in enumerate(lines)]
    for _, rank, line in sorted(written, key=lambda entry: entry[:2]):
        history.setdefault(line["step"], {})[rank] = line
    samples = {}
    for step, ranks in history.items():
        last = ranks[0]  # rank 0 is always there, and its last word tells how many others there were
        samples[step] = sorted(number for rank in range(last["ranks"]) for number in ranks[rank]["ids"])
    return samples


def global_order(data: Path, steps: int) -> dict[int, list[int]]:
    """Return step -> samples, as a single process without loader processes would read them."""
    config, _ = parse_config(arguments(data, Path("unused"), 1, steps))
    loader = PairLoader(config, TextTokenizer(data.parent / "tokenizer"), 0)
    return {step: sorted(next(loader)["sample_id"].tolist()) for step in range(steps)}


def disturb(data: Path, run: Path, ranks: int, steps: int, number: signal.Signals, moment: random.Random) -> str:
    """Start or resume the run, send a signal to one of its ranks after a few steps, and see all of it end in time."""
    seen = len((run / "samples_rank0.jsonl").read_text().splitlines()) if run.exists() else 0
    wanted = seen + moment.randint(3, 5)
    with launching("tests.engine.workers.logged", *arguments(data, run, ranks, steps), ranks=ranks) as process:
        log = run / "samples_rank0.jsonl"
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= wanted, process, 240)
        family = psutil.Process(process.pid).children(recursive=True)
        of_rank = {p.environ()["RANK"]: p for p in reversed(family) if "RANK" in p.environ()}
        time.sleep(moment.uniform(0, 0.3))  # anywhere in a step, a save or a rename
        of_rank[str(moment.randrange(ranks))].send_signal(number)
        started = time.monotonic()
        _, errors = process.communicate(timeout=BOUND)
        assert time.monotonic() - started < BOUND
        gone, left = psutil.wait_procs(family, timeout=10)
        assert not left, f"{len(gone)} processes ended, {left} are left"
    assert (process.returncode == 0) == (number == signal.SIGTERM), errors[-3000:]
    return errors


def check_history(data: Path, run: Path, steps: int) -> None:
    """Every sample exactly once per epoch, in the global order, whoever was killed when."""
    assert trained_on(run) == global_order(data, steps)
    epoch = [number for step in range(8) for number in trained_on(run)[step]]
    assert len(epoch) == len(set(epoch)) == 64
    check_whole(run / "checkpoints" / f"step_{steps:08d}")
    assert not list((run / "checkpoints").glob(".*.partial"))


def test_a_run_killed_told_to_stop_and_moved_to_other_ranks_sees_every_sample_once(tmp_path, data):
    run, moment, steps = tmp_path / "run", random.Random(0), 16
    killed = disturb(data, run, 2, steps, signal.SIGKILL, moment)
    assert "lost another rank; --resume auto goes on from the newest checkpoint" in killed
    stopped = disturb(data, run, 1, steps, signal.SIGTERM, moment)
    assert "layout changed: world_size 2 -> 1, zero_stage 2 -> 1" in stopped
    assert "settings changed: data.workers 1 -> 0, train.batch_size 4 -> 8 (another" in stopped
    at = int(stopped.split("stopped by a signal: saved at step ")[1].split(",")[0])
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{at:08d}"
    assert not (run / "final").exists()
    done = launch("tests.engine.workers.logged", *arguments(data, run, 2, steps), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"at step {at} of {steps}" in done.stderr
    check_history(data, run, steps)


@pytest.mark.slow
def test_a_run_disturbed_thirty_five_times(tmp_path, data):
    run, steps = tmp_path / "run", 400
    numbers = [signal.SIGKILL] * 25 + [signal.SIGTERM] * 10
    random.Random(1).shuffle(numbers)
    for seed, number in enumerate(numbers):
        disturb(data, run, 1 + seed % 3 % 2, steps, number, random.Random(seed))
    done = launch("tests.engine.workers.logged", *arguments(data, run, 2, steps), ranks=2, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    check_history(data, run, steps)


LAYOUTS = ["zero0:fp32", "zero1:fp32", "zero2:fp32", "zero3:fp32", "zero0:bf16", "zero1:bf16", "zero2:bf16"]
LAYOUTS += ["zero3:bf16"]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, data):
    """Two ranks, one of which has a loss that is no number at steps 1, 3, 4 and 5; three in a row end the run."""
    out = tmp_path_factory.mktemp("spoilt")
    more = ["--train.steps", "9", "--train.max_bad_steps", "3", "--train.checkpoint_every", "3"]
    keyed = keys(data, *more, "--train.batch_size", "4", "--objectives.itc.queue_size", "0")
    done = launch("tests.engine.workers.not_finite", str(out), ",".join(LAYOUTS), "1,3,4,5", *keyed, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_and_three_end_the_run(spoilt, layout):
    run = spoilt / layout.replace(":", "-")
    report = json.loads(run.with_suffix(".json").read_text())
    for moves in (report["moves"], report["teacher_moves"]):
        assert [move > 0 for move in moves] == [True, False, True, False, False, False]
    assert report["finite"]
    assert "loss/mlm (rank 1) not finite, for 3 steps in a row (train.max_bad_steps)" in report["end"]
    skipped = [(record["step"], record["skipped_step"]) for record in records(run) if "skipped_step" in record]
    assert skipped == [(step, ["loss/mlm (rank 1)"]) for step in (1, 3, 4)]
    assert list(losses(run)) == [1, 3]  # counted after the step
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000003"]
    check_whole(run / "checkpoints" / "step_00000003")
