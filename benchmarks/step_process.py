"""One contender of the step benchmark in a process of its own, and the parent's end of it.

The parent writes a command a line ("count", "bytes", "step"), the process answers each with a line of JSON. So steps of
several contenders take turns while each has its own memory, whose peak can be told.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import Operations, saved_for_backward
from benchmarks.official_order import OfficialOrder
from benchmarks.step_contenders import ALPHA, BUILD, Clock, Contender, Ours
from benchmarks.step_sizes import SIZES, changed, make_batch, make_task, with_negatives
from simla_ds.config import Config
from simla_ds.types import Batch
from simla_kernels.half import has_bf16_units

ROOT = Path(__file__).resolve().parent.parent
PROBE = (2048, 768, 3072)
"""The matrix product whose rate a step is held against."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ContenderProcess:
    """The parent's end."""

    def __init__(self, name: str, size: str, precision: str, clock: str):
        command = [sys.executable, "-m", "benchmarks.step_process", name, size, precision, clock]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # or glibc keeps what was freed before
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and return the answer. RuntimeError when the process ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contender's process ended with status {self.process.wait()} on {command!r}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def count(contender: Contender, batch: Batch) -> dict[str, Any]:
    """Run a whole step (which warms up the next) and return its operations."""
    with Operations() as operations:
        contender.step(batch, Clock())
    return {"operations": operations.total, "computes": contender.computes}


def count_bytes(contender: Contender, batch: Batch) -> dict[str, Any]:
    """Run the forward, ours also with activation checkpointing, and return what is saved for backward."""
    result = {"saved_bytes": _saved_bytes(contender, batch)}
    if isinstance(contender, Ours):
        contender.task.model.set_activation_checkpointing(True)
        result["saved_bytes_checkpointed"] = _saved_bytes(contender, batch)
        contender.task.model.set_activation_checkpointing(False)
    return result


def _saved_bytes(contender: Contender, batch: Batch) -> int:
    slow = batch["image"].device.type == "cpu" and not has_bf16_units()
    with Operations(bf16_in_fp32=slow), saved_for_backward(*contender.networks) as saved:
        contender.loss(batch)
    return saved[0]


def time_step(contender: Contender, batch: Batch, clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    """Run a step between two probes of the product's rate."""
    clock.parts.clear()
    rates = [probe(clock, batch["image"].device, dtype)]
    _forget_peak()
    started = clock.seconds()
    contender.step(batch, clock)
    seconds = clock.seconds() - started
    peak = peak_memory_mb()
    rates.append(probe(clock, batch["image"].device, dtype))
    return {"seconds": seconds, "parts": dict(clock.parts), "peak_memory_mb": peak, "gemm_gflops": rates}


def probe(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Return GFLOP/s of PROBE, the median of five."""
    m, k, n = PROBE
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    torch.mm(a, b)
    times = []
    for _ in range(5):
        started = clock.seconds()
        torch.mm(a, b)
        times.append(clock.seconds() - started)
    return 2e-9 * m * k * n / statistics.median(times)


def loss_difference(config: Config, batch: Batch) -> float:
    """Return the largest relative difference of a loss between ours in `official` fidelity and the published order.

    Same weights, batch and negatives, no dropout.
    """
    config = changed(config, objectives__fidelity="official", model__stream__dropout=0.0)
    task, batch = make_task(config), with_negatives(batch)
    with torch.no_grad():
        ours = task(batch, alpha=ALPHA)["losses"]
        published = OfficialOrder(task).losses(batch, ALPHA)
    return max(abs(float(published[name] / loss) - 1) for name, loss in ours.items())


def peak_memory_mb() -> float:
    """Return the process's highest memory since _forget_peak, in MB; on a card what was allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main(name: str, size: str, precision: str, clock: str) -> None:
    """Answer commands until there are no more."""
    config, dtype = SIZES[size], DTYPES[precision]
    batch = make_batch(config)
    if name == "agreement":
        print(json.dumps({"loss_difference": loss_difference(config, batch)}), flush=True)
        return
    contender = BUILD[name](config, dtype)
    for line in sys.stdin:
        match line.strip():
            case "count":
                answer = count(contender, batch)
            case "bytes":
                answer = count_bytes(contender, batch)
            case "step":
                answer = time_step(contender, batch, Clock(clock), dtype)
            case other:
                raise ValueError(f"no command {other!r}; there are count, bytes and step")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
