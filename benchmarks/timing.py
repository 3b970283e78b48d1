"""Time alternatives in one run: they take turns, so that a noisy machine is as noisy to each of them."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch

CPU = torch.device("cpu")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: seconds that this process computed, on all its threads; for a machine that others use too, with one thread."""


class Clock:
    """Seconds of work on a device, whole or by part. Every reading waits for a card, so that parts cost time there."""

    def __init__(self, kind: str = "wall", device: torch.device = CPU):
        self.now, self.device, self.parts = CLOCKS[kind], device, dict[str, float]()

    def seconds(self) -> float:
        """Return the time, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds of a call."""
        started = self.seconds()
        run()
        return self.seconds() - started

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what runs within this context to a part."""
        started = self.seconds()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + self.seconds() - started


def on_card(run: Callable[[], object]) -> float:
    """Return the median seconds of a call by CUDA events, many calls on end, the card's cache emptied before each."""
    from triton.testing import do_bench  # CPU runs go without triton

    median: Any = do_bench(run, warmup=10, rep=50, return_mode="median")
    return median / 1e3


def turns(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (round, name): each name once a round, in an order drawn anew, so that none gains by whom it follows."""
    random = Random(seed)
    for number in range(rounds):
        for name in random.sample(names, len(names)):
            yield number, name


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: Callable[[Callable[[], object]], float] | None = None,
    warmup: int = 2,
) -> dict[str, dict[str, float]]:
    """Time each contender once in each of `repeats` rounds; return its median and fastest time in milliseconds.

    seconds: times a call, Clock.time or on_card; default: the wall clock, on a CPU.
    """
    seconds = seconds or Clock().time
    for _, name in turns(list(contenders), warmup):
        contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _, name in turns(list(contenders), repeats):
        times[name].append(1e3 * seconds(contenders[name]))
    return {name: {"median": statistics.median(t), "fastest": min(t)} for name, t in times.items()}


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a figure needs to be told with: machine, threads, versions, commit.

    device: on which the figure was measured; default: a card where there is one, as a trainer takes it.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def machine(where: dict[str, Any]) -> str:
    """Return an environment in a phrase."""
    return f"{where['processor']}, {where['threads']} thread(s), {where['device']}, torch {where['torch']}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"
