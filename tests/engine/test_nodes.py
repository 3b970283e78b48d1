"""Several nodes, and ranks that are lost and come back. On one machine's loopback, through the real launchers."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from simla_ds.config import Config
from simla_ds.engine.checkpoint_folder import check_whole
from simla_ds.engine.run import run as train
from tests.engine.launching import ROOT, free_port
from tests.engine.runs import keys, losses, records, scenes

pytestmark = pytest.mark.launcher

SCRIPTS = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data"))


def start(stack: ExitStack, *command: str, log: Path, **environment: str) -> subprocess.Popen:
    """Start a launcher; what is left of it is killed at the end."""
    errors = stack.enter_context(log.open("w"))
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**ENVIRONMENT, **environment},
        cwd=ROOT,
        stderr=errors,
        stdout=errors,
        start_new_session=True,
    )

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    stack.callback(kill)
    return process


def test_two_nodes_train_as_one_run(tmp_path, data):
    """Two launchers with node ranks 0 and 1, which know of each other by a hostfile and the master's address."""
    hostfile, run = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    more = keys(data, "--train.steps", "3", "--train.batch_size", "4", "--output", str(run))
    launcher = [str(SCRIPTS / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(free_port())]
    with ExitStack() as stack:
        nodes = [
            start(
                stack,
                *(*launcher, "--node_rank", str(node), "launch/pretrain.py"),
                *(*more, "--deepspeed", "ds_configs/zero2.json"),
                log=tmp_path / f"node{node}.log",
            )
            for node in (1, 0)  # the master may come last
        ]
        status = [node.wait(timeout=280) for node in nodes]
    said = (tmp_path / "node0.log").read_text()
    assert status == [0, 0], said[-3000:]
    assert "3 steps of 8 pairs on 2 cpu rank(s)" in said
    assert sorted(losses(run)) == [1, 2, 3]
    assert records(run)[-1]["samples_seen"] == 24
    assert (run / "final" / "config.json").exists()


@pytest.mark.slow
def test_a_lost_rank_comes_back_by_itself(tmp_path, data):
    """torchrun is the supervisor: SIGKILL to a rank, a second start, and the run goes on to its end."""
    run, log, steps = tmp_path / "run", tmp_path / "log", 24
    more = keys(data, "--train.steps", str(steps), "--train.batch_size", "4", "--output", str(run))
    more += ["--train.checkpoint_every", "2", "--deepspeed", "ds_configs/zero2.json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    with ExitStack() as stack:
        process = start(stack, *launcher, "launch/pretrain.py", *more, log=log)
        deadline = time.monotonic() + 240
        while not (run / "checkpoints" / "step_00000004").exists():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        of_rank = {p.environ()["RANK"]: p for p in reversed(family) if "RANK" in p.environ()}
        of_rank["1"].send_signal(signal.SIGKILL)
        assert process.wait(timeout=280) == 0, log.read_text()[-3000:]
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    said = log.read_text()
    assert said.count("restart 1 of at most 2: a rank was lost or failed") == 1
    assert "restart 2" not in said
    assert said.count("resumed from") == 1
    assert sorted(losses(run)) == list(range(1, steps + 1))
    check_whole(run / "checkpoints" / f"step_{steps:08d}")


@pytest.mark.slow
def test_restarts_come_to_an_end(tmp_path):
    """A run that cannot start is tried so often and no more; every start says which it is."""
    log = tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1"]
    with ExitStack() as stack:
        process = start(stack, *launcher, "launch/pretrain.py", "--data.train", str(tmp_path / "none"), log=log)
        assert process.wait(timeout=200) != 0
    said = log.read_text()
    assert said.count("pretrain.py: error: ") == 2
    assert said.count("restart 1 of at most 1") == 1


def test_restarts_that_could_not_work_are_refused_at_the_start(monkeypatch, capsys):
    """As torchrun tells its ranks, where TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert train("pretrain.py", Config(), None) == 2
    assert "pretrain.py: error: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_tells_that_restarts_could_not_work(tmp_path):
    log = tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1"]
    with ExitStack() as stack:
        process = start(stack, *launcher, "launch/pretrain.py", log=log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
        assert process.wait(timeout=200) != 0
    assert "pretrain.py: error: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in log.read_text()
