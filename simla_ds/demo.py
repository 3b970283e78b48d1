"""`simla demo`: prepare scenes, train through the real launcher, evaluate on scenes never seen, say whether it learned.

OUT/scenes/ gets the data, OUT/run/ is the run folder (a second call goes on where the first stopped), and OUT/ the
results: curves.png, retrieved.png, results.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from simla_ds.config import Config, DataConfig
from simla_ds.data.loader import eval_batches
from simla_ds.data.scenes.prepare import prepare_scenes
from simla_ds.downstream.retrieval import DIRECTIONS, RetrievalResult, retrieve
from simla_ds.hub import SimlaProcessor, load_model_folder
from simla_ds.objectives import OBJECTIVES
from simla_ds.report import (
    Sheet,
    draw_curves,
    evaluations,
    read_metrics,
    retrieval_picture,
    retrieval_table,
    to_picture,
)

ROOT = Path(__file__).resolve().parents[1]
SCENES = 8_000
RECIPE = "launch/recipes/scenes_demo.yaml"
CPU_RANKS = 2
"""Training processes where there is no GPU; they share the cores. With GPUs the launcher takes them all."""
TRAIN_ARGUMENTS: tuple[str, ...] = ()
"""Further keys of pretrain.py."""
RERANK = 16
"""Candidates that ITM orders on the test split."""
TIMES_CHANCE = 30
"""Recall at 1 that the better of ITC and ITM must reach both ways, as a multiple of chance."""
FALLING = tuple(name for name in OBJECTIVES if name != "psl")
"""Objectives whose held-out loss must end lower than it began."""


def run_demo(out: Path, seed: int = 0) -> int:
    """Run every phase, print a table, and return 0 when the promises hold, else 1.

    Args:
        out: folder of the results.
        seed: of the training: start weights, order, views, masks. The scenes stay the same.

    Raises ValueError when the sources or what draws are not at hand, or the training fails to start.
    """
    if find_spec("matplotlib") is None:  # before minutes of training
        raise ValueError("the demo draws with matplotlib: pip install 'simla_ds[demo]'")
    out = Path(out).resolve()
    scenes, run = out / "scenes", out / "run"
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        prepare_scenes(scenes, train=SCENES)
    with _timed(seconds, "train"):
        command = training_command(scenes, run, seed)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja compiles operators
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False).returncode
    if status:
        print(f"demo: training ended with exit status {status}; its messages are above", file=sys.stderr)
        return 1
    lines = evaluations(read_metrics(run))
    with _timed(seconds, "evaluate"):
        found = _evaluate(run / "final", scenes, out / "retrieved.png")
    draw_curves(run, out / "curves.png")
    broken = broken_promises(lines, found)
    _write_results(out / "results.json", lines, found, seconds, broken)
    print(f"\nOn the test split: {retrieval_table(found)}")
    if lines:
        print("\n" + held_out_table(lines))
    print("\n" + ", ".join(f"{phase} {taken:.0f} s" for phase, taken in seconds.items()) + f"; pictures in {out}")
    for line in broken:
        print(f"demo: not held: {line}", file=sys.stderr)
    return 1 if broken else 0


def training_command(scenes: Path, run: Path, seed: int = 0) -> list[str]:
    """Return the command that the README shows, with this interpreter's deepspeed.

    Raises ValueError where the launch scripts or deepspeed are missing.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    for needed, remedy in (
        (ROOT / "launch" / "pretrain.py", "the demo needs the sources; install with pip install -e '.[train,demo]'"),
        (launcher, "install the extra `train`"),
    ):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing: {remedy}")
    return [
        *(
            sys.executable,
            str(launcher),
            *([] if torch.cuda.is_available() else ["--num_accelerators", str(CPU_RANKS)]),
        ),
        *("launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json", "--config", RECIPE),
        *("--data.train", str(scenes / "train"), "--output", str(run)),
        *("--train.seed", str(seed)),
        *TRAIN_ARGUMENTS,
    ]


def broken_promises(lines: Sequence[dict[str, Any]], result: RetrievalResult) -> list[str]:
    """Return a line for each promise that does not hold.

    Args:
        lines: the run's evaluation lines, the first from before training.
        result: the student's retrieval on the test split.
    """
    broken = []
    for direction in DIRECTIONS:
        best = max(_recall(result, score, direction) for score in ("itc", "itm"))
        wanted = TIMES_CHANCE * result.chance[direction]
        if best < wanted:
            broken.append(f"R@1 {direction.replace('_', ' ')} is {best:.1f} %, promised {wanted:.1f} % or more")
    if len(lines) < 2:
        return [*broken, f"held-out losses fall: the run wrote {len(lines)} evaluation(s), two are needed to compare"]
    first, last = lines[0], lines[-1]
    for name in FALLING:
        before, after = (float(line[f"eval/student/loss/{name}"]) for line in (first, last))
        if not after < before:
            broken.append(f"held-out {name} loss went from {before:.3f} to {after:.3f}, promised to fall")
    precision, prior = (float(last[f"eval/student/psl/{name}"]) for name in ("average_precision", "frequency_prior"))
    if not precision > prior:
        broken.append(f"keyword average precision is {precision:.3f}, promised above the frequency prior {prior:.3f}")
    return broken


def held_out_table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the student's held-out numbers, first against last evaluation, beside what a constant guess gets."""
    first, last = lines[0], lines[-1]
    rows = [f"held out, student{'':15}{'at start':>10}{'at end':>10}{'guess':>10}"]
    for name, guess in (
        *((f"loss/{name}", "") for name in OBJECTIVES),
        ("psl/average_precision", "psl/frequency_prior"),
        ("mlm/accuracy", "mlm/most_frequent"),
        ("xmm/accuracy", "xmm/most_frequent"),
        ("itm/accuracy_matched", ""),
        ("itm/accuracy_unmatched", ""),
    ):
        cells = [line.get(f"eval/student/{key}") for line, key in ((first, name), (last, name), (last, guess))]
        rows.append(f"{name:32}" + "".join(f"{'' if cell is None else format(cell, '.3f'):>10}" for cell in cells))
    return "\n".join(rows)


def _evaluate(folder: Path, scenes: Path, picture: Path) -> RetrievalResult:
    """Retrieve on the test split with the student; draw examples, right and wrong."""
    model, config = load_model_folder(folder)
    processor = SimlaProcessor.from_pretrained(folder)
    settings = Config(model=config, data=DataConfig(max_words=processor.max_words))
    loaded = list(eval_batches(settings, str(scenes / "test"), processor.tokenizer, 0))
    result = retrieve(model, [batch for batch, _ in loaded], rerank=RERANK, progress=sys.stderr.isatty())
    images = [image for batch, _ in loaded for image in batch["image"]]
    better = max(("itc", "itm"), key=lambda score: sum(_recall(result, score, d) for d in DIRECTIONS))
    sheet = Sheet(  # a scene has one caption: picture n is caption n's
        rankings={direction: result.rankings[f"{better}/{direction}"] for direction in DIRECTIONS},
        picture=lambda number: to_picture(images[number]),
        captions=[said["caption"] for _, known in loaded for said in known],
        image_of_caption=range(len(images)),
    )
    retrieval_picture(sheet, picture)
    return result


def _recall(result: RetrievalResult, score: str, direction: str) -> float:
    """Return recall at 1 in percent."""
    return result.rankings[f"{score}/{direction}"].measures()["r1"]


def _write_results(
    path: Path,
    lines: Sequence[dict[str, Any]],
    found: RetrievalResult,
    seconds: dict[str, float],
    broken: list[str],
) -> None:
    content = {
        "promises_hold": not broken,
        "broken_promises": broken,
        "seconds": seconds,
        "test": found.measures(),
        "held_out_first": lines[0] if lines else None,
        "held_out_last": lines[-1] if lines else None,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"demo: {phase}", flush=True)
    yield
    seconds[phase] = round(time.monotonic() - started, 1)
