"""A benchmark's module under the DeepSpeed launcher, on this machine's CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(module: str, ranks: int, *arguments: str) -> None:
    """Run `python -m MODULE ARGUMENTS` on so many ranks. RuntimeError, with what they said, when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    # the launcher gives every rank a CUDA_VISIBLE_DEVICES of its own, so that a card can only be hidden behind it
    hidden = ["--no_python", "--no_local_rank", "env", "CUDA_VISIBLE_DEVICES=", "HIP_VISIBLE_DEVICES="]
    command += ["--master_port", str(port), *hidden, sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module} on {ranks} rank(s) ended with status {done.returncode}:\n{done.stderr[-2000:]}")
