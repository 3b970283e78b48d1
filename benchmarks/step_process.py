"""One contender of the step benchmark in a process of its own, and the parent's end of it.

The parent writes a command a line (COMMANDS), the process answers each with a line of JSON. So steps of several
contenders take turns while each has its own memory, whose peak can be told.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import largest_difference
from benchmarks.counting import Operations, saved_for_backward
from benchmarks.official_order import OfficialOrder
from benchmarks.peak_memory import kept_environment, peak_mib, restart_peak
from benchmarks.step_contenders import ALPHA, BUILD, Contender, Ours
from benchmarks.step_sizes import SIZES, changed, make_batch, make_task, with_negatives
from benchmarks.timing import Clock
from simla_ds.config import Config
from simla_ds.types import Batch
from simla_kernels import dispatch
from simla_kernels.half import has_bf16_units

ROOT = Path(__file__).resolve().parent.parent
PROBE = {"cpu": (2048, 768, 3072), "cuda": (8192, 8192, 8192)}
"""The matrix product whose rate a step is held against; on a card large enough that its launch does not count."""
WARM_UP = {"cpu": 2, "cuda": 3}
"""Steps: on a card the first compiles kernels, and the allocator settles with the next, as it does on a CPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ContenderProcess:
    """The parent's end."""

    def __init__(self, name: str, size: str, precision: str, clock: str, device: torch.device):
        command = [sys.executable, "-m", "benchmarks.step_process", name, size, precision, clock, device.type]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=kept_environment(), text=True, stdin=pipe, stdout=pipe)

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
    """Run a whole step and return its operations: by PyTorch's path on every device, since launches of Triton's kernels
    are no operations that could be counted."""
    with dispatch.forced("torch"), Operations() as operations:
        contender.step(batch)
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
    with Operations(bf16_in_fp32=True) if slow else nullcontext(), saved_for_backward(*contender.networks) as saved:
        contender.loss(batch)
    return saved[0]


def warm_up(contender: Contender, batch: Batch) -> dict[str, Any]:
    """Run the steps that are not timed."""
    steps = WARM_UP[batch["image"].device.type]
    for _ in range(steps):
        contender.step(batch)
    return {"steps": steps}


def time_step(contender: Contender, batch: Batch, clock: Clock) -> dict[str, Any]:
    """Run a step, its clock read before and after only, between two probes of the product's rate."""
    rates = [probe(clock, contender.multiplies)]
    restart_peak(clock.device)
    seconds = clock.time(lambda: contender.step(batch))
    peak = peak_mib(clock.device) * 2**20 / 1e6
    rates.append(probe(clock, contender.multiplies))
    return {"seconds": seconds, "peak_memory_mb": peak, "gemm_gflops": rates}


def time_parts(contender: Contender, batch: Batch, clock: Clock) -> dict[str, Any]:
    """Run a step by its parts, whose clocks hold a card up: their sum is more than a step's time there."""
    clock.parts.clear()
    contender.step(batch, clock.part)
    return {"seconds_by_part": dict(clock.parts)}


def probe(clock: Clock, dtype: torch.dtype) -> float:
    """Return GFLOP/s of PROBE in this dtype, the median of five."""
    m, k, n = PROBE[clock.device.type]
    a, b = torch.randn(m, k, device=clock.device).to(dtype), torch.randn(k, n, device=clock.device).to(dtype)
    torch.mm(a, b)
    return 2e-9 * m * k * n / statistics.median(clock.time(lambda: torch.mm(a, b)) for _ in range(5))


def loss_difference(config: Config, batch: Batch) -> float:
    """Return the largest relative difference of a loss between ours in `official` fidelity and the published order.

    Same weights, batch and negatives, no dropout.
    """
    config = changed(config, objectives__fidelity="official", model__stream__dropout=0.0)
    task, batch = make_task(config, device=batch["image"].device), with_negatives(batch)
    with torch.no_grad():
        ours = task(batch, alpha=ALPHA)["losses"]
        published = OfficialOrder(task).losses(batch, ALPHA)
    return largest_difference(list(ours.values()), [published[name] for name in ours])


COMMANDS: dict[str, Callable[[Contender, Batch, Clock], dict[str, Any]]] = {
    "bytes": lambda contender, batch, clock: count_bytes(contender, batch),
    "count": lambda contender, batch, clock: count(contender, batch),
    "warm up": lambda contender, batch, clock: warm_up(contender, batch),
    "parts": time_parts,
    "step": time_step,
}


def main(name: str, size: str, precision: str, clock: str, device: str) -> None:
    """Answer commands until there are no more."""
    config, where = SIZES[size], torch.device(device)
    batch = make_batch(config, device=where)
    if name == "agreement":
        print(json.dumps({"loss_difference": loss_difference(config, batch)}), flush=True)
        return
    contender = BUILD[name](config, DTYPES[precision], where)
    for line in sys.stdin:
        answer = COMMANDS[line.strip()](contender, batch, Clock(clock, where))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
