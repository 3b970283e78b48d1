"""A long run of two ranks: neither memory nor open files grow. Through the real launcher, on CPU."""

import statistics
import time

import psutil
import pytest

from tests.engine.launching import ROOT, launching
from tests.engine.runs import keys, records, scenes

pytestmark = pytest.mark.launcher

STEPS, SETTLED = 3000, 1000


def members(launcher: int) -> list[psutil.Process]:
    """Return the ranks and their loader processes."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if "RANK" in process.environ():
                found.append(process)
        except psutil.NoSuchProcess:  # the compiler that DeepSpeed starts, say
            continue
    return found


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are_over_2000_steps(tmp_path):
    run = tmp_path / "run"
    more = ["--train.steps", str(STEPS), "--train.batch_size", "2", "--train.checkpoint_every", "500"]
    more += ["--train.log_every", "25", "--train.diagnose_every", "500", "--data.workers", "1", "--output", str(run)]
    more += ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
    seen: list[tuple[int, int, int]] = []  # step, bytes, open files
    with launching(ROOT / "launch" / "pretrain.py", *keys(scenes(tmp_path), *more), ranks=2) as process:
        family: list[psutil.Process] = []
        while process.poll() is None:
            time.sleep(1)
            steps = [record["step"] for record in records(run)] if (run / "metrics.jsonl").exists() else []
            if not steps or steps[-1] < SETTLED:
                continue
            family = family or members(process.pid)
            try:
                measured = [(member.memory_info().rss, member.num_fds()) for member in family]
            except psutil.NoSuchProcess:  # the end
                break
            seen.append((steps[-1], sum(size for size, _ in measured), sum(files for _, files in measured)))
        process.wait()
    assert process.returncode == 0
    first = [(size, files) for step, size, files in seen if step < SETTLED + 300]
    last = [(size, files) for step, size, files in seen if step >= STEPS - 300]
    before, open_before = (statistics.median(column) for column in zip(*first, strict=True))
    after, open_after = (statistics.median(column) for column in zip(*last, strict=True))
    growth = after / before - 1
    print(
        f"{before / 2**20:.1f} MiB at step {SETTLED}, {after / 2**20:.1f} at {STEPS}: {growth:+.2%}; {open_after} files"
    )
    assert growth < 0.02
    assert open_after <= open_before
