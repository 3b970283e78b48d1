"""A rank of `python -m benchmarks memory`: the real trainer, with every tensor's allocation counted.

Arguments: RUNS.json, a list of lists of pretrain.py's arguments, and OUT.json, where rank 0 writes what it found.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.peak_memory import peak_mib, restart_peak
from benchmarks.timing import environment
from simla_ds.config import Config
from simla_ds.engine.distributed import Ranks, finish, start
from simla_ds.engine.trainer import DTYPES, Trainer
from simla_ds.parsing import parse_config
from simla_ds.planner.memory import Zero, count_parameters, plan_memory
from simla_ds.planner.shape import StepShape

STEPS = 2
"""The first makes the optimizer's moments; the last is looked at."""


class Allocations:
    """Bytes of CPU tensors alive over time, from the first allocation within this context on."""

    def __init__(self):
        # torch counts a tensor's release on another thread (gloo's) only when told to count at any time
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)

    def __enter__(self) -> Allocations:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        profiler: Any = self._profile.profiler  # what a profile that has ended holds; its type says it may hold none
        events = list(_walk(profiler.kineto_results.experimental_event_tree()))
        sizes = sorted(
            (e.start_time_ns, e.extra_fields.total_allocated, e.extra_fields.alloc_size)
            for e in events
            if e.tag == _EventType.Allocation
        )
        before = sizes[0][1] - sizes[0][2]
        self._live = [(time, total - before) for time, total, _ in sizes]
        self._spans = {e.name: (e.start_time_ns, e.end_time_ns) for e in events if e.name.startswith("span:")}

    def most(self, span: str) -> int:
        """Return the most bytes alive within a span (record_function("span:NAME"))."""
        begin, end = self._spans[f"span:{span}"]
        return max([self.after(span), *(total for time, total in self._live if begin <= time <= end)])

    def after(self, span: str) -> int:
        """Return the bytes alive when it ended."""
        end = self._spans[f"span:{span}"][1]
        return next(total for time, total in reversed(self._live) if time <= end)


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def measure(arguments: list[str], output: Path, ranks: Ranks) -> dict[str, Any]:
    """Train twice, first to see the process's memory and then with allocations counted; return both and the plan."""
    config, launch = parse_config([*arguments, "--train.steps", str(STEPS), "--output", str(output)])
    gc.collect()
    before = restart_peak()
    _train(config, launch.deepspeed, ranks)
    peak_rss = peak_mib() - before
    gc.collect()  # what is let go of while allocations are counted would be subtracted
    with Allocations() as allocations:
        trainer = _train(config, launch.deepspeed, ranks)
    settings = json.loads(Path(launch.deepspeed).read_text()) if launch.deepspeed else {}
    dtype, config = next(iter(trainer.task.teacher.module.parameters())).dtype, trainer.config
    parameters = count_parameters(config.model)
    planned = plan_memory(
        config,
        StepShape.of(trainer.last_batch),
        Zero.of(settings),
        ranks.world_size,
        dtype.itemsize,
        parameters,
        cpu=True,
    )
    batch = planned.parts["batch"]  # gone when the step has ended
    return {
        "parameters": parameters.total,
        "precision": next(name for name, known in DTYPES.items() if known == dtype),
        "zero": str(Zero.of(settings)),
        "ranks": ranks.world_size,
        "checkpointing": config.train.activation_checkpointing,
        "resident": allocations.after("step") + batch,
        "resident_planned": planned.resident,
        "peak": allocations.most("step"),
        "peak_planned": planned.peak,
        "peak_rss": peak_rss * 2**20,
        "parts_planned": {**planned.parts, "activations": planned.activations},
        "environment": environment(ranks.device),
    }


def _train(config: Config, deepspeed_json: str | None, ranks: Ranks) -> Trainer:
    trainer = Trainer(config, deepspeed_json, ranks)
    for _ in range(STEPS):
        with record_function("span:step"):
            trainer._optimizer_step()
            time.sleep(0.1)  # gloo's threads let go of buffers, unseen until
            torch.empty(1)  # this thread allocates again
    trainer.loader.close()
    trainer.stop.close()
    trainer.metrics.close()
    return trainer


def main() -> None:
    """Measure every run and write what was found."""
    runs, out = map(Path, sys.argv[1:])
    ranks = start()
    try:
        found = [
            measure(arguments, out.parent / f"{out.stem}_{number}", ranks)
            for number, arguments in enumerate(json.loads(runs.read_text()))
        ]
        if ranks.is_main:
            out.write_text(json.dumps(found))
    finally:
        finish()


if __name__ == "__main__":
    main()
