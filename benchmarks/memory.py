"""What `simla plan` computes against what the real trainer holds: `python -m benchmarks memory`.

Each case is a run of two steps through the DeepSpeed launcher on this machine's CPU, with DeepSpeed's buckets small
enough that they do not hide everything else. Nothing in the plan was fitted to any of them but what its sources say.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import conclude, new_result
from benchmarks.launching import ROOT, launch

BUCKET = 500_000
"""Numbers in each of DeepSpeed's buckets: 2 MB."""
RECIPES = ROOT / "launch" / "recipes"


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    keys: str
    """Of pretrain.py."""
    stage: int
    ranks: int
    precision: str = "fp32"


WIDE = (
    "--model.vision.width 256 --model.vision.layers 2 --model.stream.width 256 --model.stream.layers 2 "
    "--model.stream.intermediate_size 1024 --train.batch_size 2"
)
TINY = f"--config {RECIPES}/scenes_tiny.yaml --train.batch_size 8"
SMALL = f"--config {RECIPES}/scenes_small.yaml --train.batch_size 4"
CHECKPOINTS = "--train.activation_checkpointing true"
CASES = [
    *(Case("wide", WIDE, stage, ranks) for ranks in (1, 2) for stage in range(4)),
    *(Case("wide", WIDE, stage, 2, "bf16") for stage in range(4)),
    *(Case("scenes_tiny", TINY, stage, 1 + stage % 2) for stage in range(4)),
    *(Case("scenes_tiny, checkpoints", f"{TINY} {CHECKPOINTS}", stage, 2) for stage in (0, 3)),
    *(Case("scenes_small", SMALL, stage, 2) for stage in (0, 2, 3)),
    *(Case("scenes_small, checkpoints", f"{SMALL} {CHECKPOINTS}", stage, 1) for stage in (1, 2)),
]


def run(cases: Sequence[Case], scenes: Path, folder: Path) -> list[dict[str, Any]]:
    """Run cases of one number of ranks in one launch and return what memory_process found of each."""
    (ranks,) = {case.ranks for case in cases}
    runs, out = folder / "runs.json", folder / "found.json"
    runs.write_text(json.dumps([_arguments(case, scenes, folder) for case in cases]))
    launch("benchmarks.memory_process", ranks, str(runs), str(out))
    return [{"case": case.name, **found} for case, found in zip(cases, json.loads(out.read_text()), strict=True)]


def _arguments(case: Case, scenes: Path, folder: Path) -> list[str]:
    settings = json.loads((ROOT / "ds_configs" / f"zero{case.stage}.json").read_text())
    zero = settings["zero_optimization"]
    small = {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    zero |= {name: value for name, value in small.items() if name in zero}
    if case.stage == 3:  # or most of a small model would be kept whole
        zero["stage3_param_persistence_threshold"] = 1000
    file = folder / f"zero{case.stage}.json"
    file.write_text(json.dumps(settings))
    return [
        *case.keys.split(),
        *("--deepspeed", str(file), "--data.train", str(scenes / "train"), "--data.workers", "0"),
        *("--eval.every", "0", "--train.diagnose_every", "0", "--train.precision", case.precision),
    ]


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield Markdown lines: planned and measured, in MB."""
    what = ["from step to step: plan / measured", "ratio", "peak: plan / measured", "ratio", "peak RSS"]
    yield "| " + " | ".join(["case", "M parameters", "precision", "layout", "ranks", *what]) + " |"
    yield "|" + "---|" * 10
    for one in found:
        cells = [one["case"], f"{one['parameters'] / 1e6:.1f}", one["precision"], one["zero"], str(one["ranks"])]
        for what in ("resident", "peak"):
            planned, measured = one[f"{what}_planned"], one[what]
            cells += [f"{planned / 1e6:.1f} / {measured / 1e6:.1f}", f"{planned / measured:.2f}"]
        yield "| " + " | ".join([*cells, f"{one['peak_rss'] / 1e6:.0f}"]) + " |"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        parser.error(f"--only {arguments.only!r} fits none of {', '.join(sorted({case.name for case in CASES}))}")
    from simla_ds.data.scenes.prepare import prepare_scenes

    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        prepare_scenes(folder / "scenes", train=64, shard_size=20, splits={"val": 8}, workers=1, progress=False)
        for case in cases:
            found += run([case], folder / "scenes", folder)  # a process each: what it had before is no baseline
            print(list(table(found))[-1], file=sys.stderr, flush=True)
    where, *_ = (one.pop("environment") for one in found)  # the ranks': one machine, the same threads
    return conclude(new_result("memory", where, cases=found), "\n".join(table(found)), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
