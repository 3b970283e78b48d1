"""The tasks on scenes: `python -m benchmarks tasks --model runs/demo/run/final --scenes runs/demo/scenes`.

Each task is learnt from a pretrained model, and from scratch; VQA, NLVR2 and SNLI-VE also with the pictures blanked and
with the words blanked, which shows what a task gives away. Every run is launch/finetune.py's: same trainer, same
defaults but for its length and the teacher, who has no say (alpha 0). Measured on scenes of the test split. With
--json, runs that the file holds already are not repeated, so that a table can be made in pieces: of one model and one
set of scenes, told by their hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_efficiency.identity import code_hash
from benchmarks.data_efficiency.rows import write_whole
from benchmarks.timing import environment
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.downstream.evaluation import evaluate_folder
from simla_ds.downstream.tasks import make_task
from simla_ds.hub import WEIGHTS
from simla_ds.parsing import parse_config

ZERO = Path(__file__).parents[1] / "ds_configs" / "zero0.json"
WAYS = ("pretrained", "scratch", "text", "image")
"""Starts from the model, from random weights, or from the model with the other input blanked."""
LEARNT = {"vqa": WAYS, "nlvr2": WAYS, "snli_ve": WAYS, "retrieval": WAYS[:2], "grounding": WAYS[:2]}
GUESS = {"vqa": "majority", "nlvr2": "majority", "snli_ve": "majority", "grounding": "centre", "retrieval": "chance"}
"""The measure beside the task's own that knows nothing of the input."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    way: str
    seed: int

    @property
    def name(self) -> str:
        """As in the stored results."""
        return f"{self.task}/{self.way}/{self.seed}"

    @property
    def inputs(self) -> str:
        """What the model gets to see."""
        return self.way if self.way in ("text", "image") else "both"

    def arguments(self, model: Path, scenes: Path, output: Path, samples: int) -> list[str]:
        """Return what launch/finetune.py would be given."""
        return [
            *("--task", self.task, "--inputs", self.inputs, "--output", str(output), "--deepspeed", str(ZERO)),
            *("--data.train", str(scenes / "train"), "--data.val", str(scenes / "val"), "--data.workers", "0"),
            *("--data.tokenizer", str(model), "--train.samples", str(samples), "--train.seed", str(self.seed)),
            *("--train.checkpoint_every", "0", "--eval.every", "0", "--objectives.alpha", "0"),
            *(("--init.checkpoint", str(model)) if self.way != "scratch" else sizes_of(model)),
        ]


def sizes_of(model: Path) -> tuple[str, ...]:
    """Return the arguments that give a model from scratch the sizes of a folder's."""
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))["model"]
    given = {f"model.{part}.{key}": value for part in ("vision", "stream") for key, value in described[part].items()}
    given["model.projection_size"] = described["projection_size"]
    return tuple(word for key, value in given.items() for word in (f"--{key}", json.dumps(value)))


def jobs(tasks: Sequence[str], ways: Sequence[str], seeds: int) -> Iterator[Job]:
    """Yield all runs, every task and way with one seed before the next seed."""
    for seed in range(seeds):
        for task in tasks:
            yield from (Job(task, way, seed) for way in LEARNT[task] if way in ways)


def run(job: Job, model: Path, scenes: Path, samples: int, limit: int) -> dict[str, float]:
    """Train and evaluate; return the measures, and seconds of training by wall clock and of this process."""
    from simla_ds.engine.distributed import start
    from simla_ds.engine.finetune import build_finetuning
    from simla_ds.engine.trainer import Trainer

    ranks = start()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        config, launch = parse_config(job.arguments(model, scenes, output, samples), FinetuneConfig, "tasks", "")
        wall, cpu = time.perf_counter(), time.process_time()
        Trainer(config, launch.deepspeed, ranks, build_finetuning).fit()
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        inputs: Any = job.inputs
        measures, predictions, found = evaluate_folder(
            job.task, output / "final", str(scenes / "test"), inputs=inputs, limit=limit
        )
    if job.task == "vqa":
        measures["majority"] = commonest_per_question(found.entries, predictions)
    if job.task == "retrieval":
        measures["chance"] = 100 * statistics.mean(k / measures["captions"] for k in (1, 5, 10))
    return {**measures, **spent}


def commonest_per_question(entries: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]) -> float:
    """Return the accuracy in percent of always giving the commonest answer to a kind of question."""
    answers: dict[str, list[str]] = {}
    for said in predictions:
        entry = entries[said["entry"]]
        answers.setdefault(entry["question_type"], []).append(entry["answer"])
    return 100 * sum(max(map(a.count, set(a))) for a in answers.values()) / len(predictions)


def differing(stored: dict[str, Any], settings: dict[str, Any], *, adding: bool) -> str:
    """Return why results of these settings do not belong beside the stored ones; "" when they do.

    A file from before models were recorded can be shown, and not added to.
    """
    for name, value in settings.items():
        if name in stored and stored[name] != value:
            return f"was made with {name} {stored[name]}, not {value}"
        if name not in stored and adding:
            return f"does not say of which {name} its results are (here: {value}), so that nothing can be added"
    return ""


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:12]


def trainer_device() -> torch.device:
    """Return the kind of device that the runs took."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return torch.device(accelerator.current_device_name())


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a row per task: mean and range over seeds of each way, and a guess."""
    lines = [
        "| task | measure | pretrained | from scratch | text only | image only | guess |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, ways in LEARNT.items():
        metric, cells, guess = make_task(task, None).metric, [], ""
        for way in WAYS:
            of_way = [at for name, at in results.items() if name.startswith(f"{task}/{way}/")]
            values = [at[metric] for at in of_way]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "" if way in ways else "-")
            guess = f"{of_way[0][GUESS[task]]:.1f}" if of_way else guess
        lines.append(f"| {task} | {metric} | " + " | ".join(cells) + f" | {guess} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is not stored yet, store each result as it comes, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tasks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="pretrained model folder")
    parser.add_argument(
        "--scenes", type=Path, required=True, metavar="DIR", help="folder of the scenes it was trained on"
    )
    parser.add_argument("--tasks", nargs="+", choices=LEARNT, default=list(LEARNT), help="default: all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--samples", type=int, default=5120, metavar="N", help="examples per run (default: 5120)")
    parser.add_argument("--limit", type=int, default=300, metavar="N", help="test scenes used; 0: all (default: 300)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store, and go on with, the results")
    arguments = parser.parse_args(argv)
    for needed in (arguments.model / WEIGHTS, arguments.scenes / "manifest.json"):
        if not needed.is_file():
            parser.error(
                f"{needed} is not there: --model takes a model folder, --scenes what `simla prepare scenes` made"
            )
    settings = {"samples": arguments.samples, "test_scenes": arguments.limit}
    settings |= {
        "code": code_hash(),
        "model": _hash(arguments.model / WEIGHTS),
        "scenes": _hash(arguments.scenes / "manifest.json"),
    }
    stored: dict[str, Any] = {"benchmark": "tasks", **settings, "environment": {}, "results": {}}
    if arguments.json and arguments.json.is_file():
        stored = json.loads(arguments.json.read_text(encoding="utf-8"))
    missing = [
        job for job in jobs(arguments.tasks, arguments.ways, arguments.seeds) if job.name not in stored["results"]
    ]
    if refusal := differing(stored, settings, adding=bool(missing)):
        print(f"tasks: error: {arguments.json} {refusal}; name another file with --json", file=sys.stderr)
        return 2
    for job in missing:
        measured = run(job, arguments.model, arguments.scenes, arguments.samples, arguments.limit)
        stored["environment"] = stored["environment"] or environment(trainer_device())
        stored["results"][job.name] = measured
        metric = make_task(job.task, None).metric
        print(f"{job.name}: {metric} {measured[metric]:.1f}, {measured['cpu_seconds']:.0f} CPU s", file=sys.stderr)
        if arguments.json:
            write_whole(arguments.json, json.dumps(stored, indent=1) + "\n")
    print(table(stored["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
