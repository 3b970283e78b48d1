"""Running a script under the real DeepSpeed launcher, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launch(
    script: str | Path,
    *args: str,
    ranks: int = 1,
    timeout: float = 280,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_accelerators RANKS SCRIPT ARGS` over gloo; return exit status, stdout and stderr.

    On timeout the launcher and all its ranks are killed and a TimeoutError tells what they had printed.
    """
    with launching(script, *args, ranks=ranks, cwd=cwd) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            raise TimeoutError(f"{script} ran longer than {timeout} s\n{stdout[-4000:]}\n{stderr[-4000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def fit_all(runs: dict[Path, list[str]], ranks: int) -> str:
    """Train each run folder with its arguments (workers/fits.py), all in one launch; return what was said."""
    folder = next(iter(runs)).parent
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "runs.json"
    plan.write_text(json.dumps({str(run): arguments for run, arguments in runs.items()}))
    done = launch("tests.engine.workers.fits", str(plan), ranks=ranks, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@contextmanager
def launching(
    script: str | Path, *args: str, ranks: int = 1, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start `deepspeed --num_accelerators RANKS SCRIPT ARGS`; kill what is left of it at the end.

    Each rank has one thread: tests run side by side, and threads that wait for each other slow tiny models tenfold.
    A script that does not end in .py is a module's dotted name, run from the checkout (so that it can import tests.*).
    """
    scripts = Path(sys.executable).parent  # of the environment: `deepspeed`, and ninja, which torch looks for on PATH
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [sys.executable, str(scripts / "deepspeed"), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port())]
    if not str(script).endswith(".py"):
        command.append("--module")
        cwd = cwd or ROOT
    process = subprocess.Popen(
        [*command, str(script), *args],
        env=environment,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a process group of its own, to be killed whole
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float) -> None:
    """Return when the condition holds; AssertionError when the process has ended or the seconds are over by then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
