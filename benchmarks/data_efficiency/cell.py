"""One cell: the real training command, then the measures, then a row."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.data_efficiency.cost import step_gflop
from benchmarks.data_efficiency.data import Pairs, completed, identity, with_start_weights
from benchmarks.data_efficiency.devices import device, slots
from benchmarks.data_efficiency.grid import Cell, Grid
from benchmarks.data_efficiency.identity import ROOT, code_hash, config_hash
from benchmarks.data_efficiency.measures import measure
from benchmarks.data_efficiency.rows import DONE, Row, write_whole
from benchmarks.launching import launcher
from benchmarks.timing import environment
from simla_ds.config import Config
from simla_ds.engine.deepspeed_config import resolve_precision
from simla_ds.hub import resolve_weights
from simla_ds.parsing import dump_config, parse_config

SAME = ("pairs", "pairs_seen", "steps", "gflop", "metrics", "gradient_share", "losses")
"""What a repeated cell must give again, to the last digit, on the same machine."""


class Planned:
    """A cell with everything decided: what is trained, on what, and the hash that identifies it."""

    def __init__(self, grid: Grid, cell: Cell, pairs: Pairs):
        """Raises SystemExit, with a line on stderr, for a configuration that cannot be (as launch/pretrain.py)."""
        self.grid, self.cell, self.pairs = grid, cell, pairs
        self.folder = pairs.work / "cells" / cell.name
        base = replace(cell, objectives="simla")
        config, plain = (
            completed(read_settings(grid, each, pairs.work), pairs, cell.fraction, grid.queue_size)
            for each in (cell, base)
        )
        start = pairs.work / "start" / f"{cell.name}-{config_hash([pairs.digest, identity(config), identity(plain)])}"
        config = with_start_weights(config, plain, start)
        self.config: Config = replace(config, output=str(self.folder / "run"), resume="none")
        train = self.config.train
        self.execution = {
            "device": device(),
            "precision": resolve_precision(train.precision, device()),
            "global_batch": train.batch_size * train.grad_accumulation * grid.launch.ranks,
        }
        said = {
            "config": identity(self.config),
            "execution": self.execution,
            "launch": asdict(grid.launch) | {"deepspeed": json.loads((ROOT / grid.launch.deepspeed).read_text())},
            "measure": asdict(grid.measure),
            "data": pairs.digest,
            "fraction": cell.fraction,
        }
        self.config_hash = config_hash(said)

    @property
    def command(self) -> list[str]:
        """Return the training command, to be run in the project's root. Raises ValueError for too few cards."""
        launch = self.grid.launch
        programme = ["launch/pretrain.py", "--deepspeed", launch.deepspeed]
        return [
            *launcher(launch.ranks, slots(1, launch.ranks)[0]),
            *programme,
            "--config",
            str(self.folder / "recipe.yaml"),
        ]


def read_settings(grid: Grid, cell: Cell, work: Path) -> Config:
    """Return a cell's configuration, checked by the training programme's own parser."""
    recipe = work / "recipes" / f"{cell.name}.yaml"
    write_whole(recipe, json.dumps(grid.settings(cell), indent=1))  # JSON is YAML; the base is many cells' own
    config, _ = parse_config(["--config", str(recipe)], program="data_efficiency")
    return config


def run_cell(planned: Planned) -> Row:
    """Train, measure and return the row. Raises RuntimeError when the training fails; train.log says more."""
    cell, grid, pairs = planned.cell, planned.grid, planned.pairs
    shutil.rmtree(planned.folder, ignore_errors=True)
    planned.folder.mkdir(parents=True)
    (planned.folder / "recipe.yaml").write_text(dump_config(planned.config), encoding="utf-8")
    command, clock = planned.command, {}
    with timed(clock, ""):
        train(command, planned.folder / "train.log", grid.launch.threads)
    run = Path(planned.config.output)
    trained, _ = parse_config(["--config", str(run / "config.yaml")], program="data_efficiency")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = int(lines[-1]["step"])
    with timed(clock, "measure_"):
        metrics = {
            who: measure(
                resolve_weights(run / "final", who),
                trained.objectives.enabled,
                {split: pairs.splits[split] for split in grid.measure.splits},
                pictures=grid.measure.pictures,
                rerank=grid.measure.rerank,
                device=device(),
            )
            for who in ("student", "teacher")
        }
    per_step = step_gflop(trained, grid.launch.ranks, pairs.count(cell.fraction), device())
    shutil.rmtree(run / "checkpoints")  # nothing goes on from here
    return {
        "grid": grid.name,
        "cell": cell.name,
        "status": DONE,
        "group": cell.group,
        "objectives": cell.objectives,
        "variant": cell.variant,
        "fraction": cell.fraction,
        "seed": cell.seed,
        "pairs": pairs.count(cell.fraction),
        "pairs_seen": int(lines[-1]["samples_seen"]),
        "steps": steps,
        "gflop": per_step * steps,
        **clock,
        "metrics": metrics,
        "gradient_share": mean_of(lines, "gradient_share/"),
        "losses": mean_of(lines[-5:], "loss/"),
        "commit": environment()["commit"],
        "code_hash": code_hash(),
        "grid_hash": grid.shared_hash,
        "data_hash": pairs.digest,
        "config_hash": planned.config_hash,
        "config": identity(planned.config),
        "execution": planned.execution,
        "environment": environment() | {"threads": grid.launch.threads, "ranks": grid.launch.ranks},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": " ".join(["deepspeed", *command[2:-1], "recipe.yaml"]),
    }


def train(command: list[str], log: Path, threads: int) -> None:
    """Run the training command. Raises RuntimeError with what the log says first of an error when it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja compiles operators
    environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env=environ, stdout=out, stderr=out, check=False).returncode
    if status:
        said = [line for line in log.read_text(encoding="utf-8").splitlines() if "error" in line.lower()]
        raise RuntimeError(f"training ended with exit status {status}: {(said or ['it said nothing'])[0]}")


def mean_of(lines: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Return the means of what starts with a prefix, over the lines that have it."""
    names = sorted({name for line in lines for name in line if name.startswith(prefix)})
    values = {name: [line[name] for line in lines if name in line] for name in names}
    return {name.removeprefix(prefix): math.fsum(v) / len(v) for name, v in values.items()}


@contextmanager
def timed(clock: dict[str, float], prefix: str) -> Iterator[None]:
    """Add to clock the wall `seconds` and `cpu_seconds` of a block, those of processes it started included."""
    wall, cpu = time.monotonic(), _cpu_seconds()
    yield
    clock[f"{prefix}seconds"] = round(time.monotonic() - wall, 1)
    clock[f"{prefix}cpu_seconds"] = round(_cpu_seconds() - cpu, 1)


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
