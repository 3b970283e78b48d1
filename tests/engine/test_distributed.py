"""Starting and ending ranks under the real launcher."""

import json
from pathlib import Path

import pytest

from simla_ds.engine.distributed import start
from tests.engine.launching import launch


@pytest.fixture(scope="module")
def done():
    return launch("tests.engine.workers.shared_memory", ranks=2)


@pytest.mark.launcher
def test_an_error_is_said_once_whichever_rank_has_it(done):
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert len(lines) == 2, done.stderr[-3000:]
    assert lines[0].startswith("error: of one (rank 1, ")
    assert lines[1].startswith("error: the same on both")


@pytest.mark.launcher
def test_killed_ranks_leave_nothing_in_shared_memory(done):
    said = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), None)
    assert said, done.stderr[-3000:]
    buffer = f"_{said['port']}_"
    assert all(sum(buffer in name for name in names) == 2 for names in said["mapped"]), "nothing is shared any more?"
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*{buffer}*"))


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_without_ranks_are_refused(monkeypatch, name):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=rf"{name}=4, but RANK is not set: start one `deepspeed` launcher per node"):
        start()
