"""The DeepSpeed launcher, as benchmarks start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launcher(ranks: int, cards: Sequence[str] = ()) -> list[str]:
    """Return the beginning of a command: so many ranks, on a free port.

    cards: numbers of the CUDA cards that they run on, one each; none: those that the launcher finds, or the CPU.
    """
    where = ["--include", f"localhost:{','.join(cards)}"] if cards else ["--num_accelerators", str(ranks)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, str(Path(sys.executable).parent / "deepspeed"), *where, "--master_port", str(port)]


def launch(module: str, ranks: int, *arguments: str) -> None:
    """Run `python -m MODULE ARGUMENTS` on ranks on the CPU. RuntimeError, with what they said, when one fails."""
    # the launcher gives every rank a CUDA_VISIBLE_DEVICES of its own, so that a card can only be hidden behind it
    hidden = ["--no_python", "--no_local_rank", "env", "CUDA_VISIBLE_DEVICES=", "HIP_VISIBLE_DEVICES="]
    command = [*launcher(ranks), *hidden, sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module} on {ranks} rank(s) ended with status {done.returncode}:\n{done.stderr[-2000:]}")
