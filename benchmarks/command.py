"""What the benchmarks' command lines share: how a figure is timed, what is stored with it, when a run has failed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import CLOCKS, environment


def add_timing(parser: argparse.ArgumentParser, repeats: int, of: str) -> None:
    """Add --device, --clock and --repeats (of what); `parse_timing` checks them."""
    card = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=card, help="default: a card where there is one")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"{of} (default: {repeats})")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own seconds, for a machine "
                        "that others use as well; with OMP_NUM_THREADS=1 (default: wall)")  # fmt: skip


def parse_timing(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, `device` a torch.device; what cannot be timed so is refused with status 2."""
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no card; set --device cpu")
    if arguments.clock == "cpu" and arguments.device == "cuda":
        parser.error("--clock cpu does not count what a card computes; set --clock wall or --device cpu")
    if arguments.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error(f"--clock cpu adds up {torch.get_num_threads()} threads' seconds; set OMP_NUM_THREADS=1")
    arguments.device = torch.device(arguments.device)
    return arguments


def new_result(benchmark: str, where: dict[str, Any] | None = None, **content: Any) -> dict[str, Any]:
    """Return a result to be stored; `where` is the environment it was measured in, this process's on a CPU if None."""
    date = time.strftime("%Y-%m-%dT%H:%M")
    where = where or environment(torch.device("cpu"))
    return {"benchmark": benchmark, "date": date, "environment": where, **content}


def conclude(result: dict[str, Any], text: str, out: Path | None) -> int:
    """Print, store where that is asked for, and return the exit status: 1 when the result has `objections`."""
    print(text)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    objections = result.get("objections", [])
    for line in objections:
        print(f"{result['benchmark']}: error: {line}", file=sys.stderr)
    return 1 if objections else 0
