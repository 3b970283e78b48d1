"""Small training runs for launcher tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simla_ds.data.scenes.prepare import prepare_scenes

MODEL = ["--model.vision.width", "32", "--model.vision.layers", "2", "--model.vision.heads", "2"]
MODEL += ["--model.stream.width", "32", "--model.stream.layers", "2", "--model.stream.heads", "2"]
MODEL += ["--model.stream.intermediate_size", "64"]


def scenes(folder: Path, val: int = 8) -> Path:
    """Prepare 64 training and some held-out scenes; return the folder of the training shards."""
    prepare_scenes(
        folder / "scenes",
        train=64,
        shard_size=20,
        codebook_size=16,
        vocabulary_size=300,
        splits={"val": val},
        workers=1,
        progress=False,
    )
    return folder / "scenes" / "train"


def keys(train: Path, *more: str) -> list[str]:
    """Return arguments of pretrain.py for a tiny run that logs every step."""
    return [
        *MODEL,
        *("--data.train", str(train), "--data.workers", "0", "--objectives.itc.queue_size", "16"),
        *("--train.log_every", "1", "--train.diagnose_every", "0", "--train.precision", "fp32", "--eval.every", "0"),
        *more,
    ]


def records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Return step -> its losses, from the training lines."""
    return {
        record["step"]: {name: value for name, value in record.items() if name.startswith("loss")}
        for record in records(run)
        if "loss" in record
    }
