"""Evaluate a task's model folder on an annotation file, or on scenes' shards, in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from simla_ds.data.processor import SimlaProcessor
from simla_ds.downstream.annotations import Annotations
from simla_ds.downstream.config import FinetuneConfig, FinetuneData
from simla_ds.downstream.examples import ExampleMaker, held_out_batches
from simla_ds.downstream.tasks import ANSWERS, load_annotations, make_task, read_answers
from simla_ds.hub import load_model_folder


def evaluate_folder(
    task: str,
    folder: Path,
    source: str,
    image_root: str = "",
    *,
    answers: Path | None = None,
    batch_size: int = 50,
    inputs: Literal["both", "text", "image"] = "both",
    limit: int = 0,
    device: str = "auto",
    official: bool = False,
    workers: int = 1,
) -> tuple[dict[str, float], list[dict[str, Any]], Annotations]:
    """Return a task's measures, its predictions and the entries they are about.

    Args:
        task: name of the task; the folder must hold a model of it.
        folder: as fine-tuning writes it (best/ or final/).
        source, image_root: see tasks.load_annotations.
        answers: VQA's list to rank, else the folder's; a folder without one answers freely.
        batch_size: entries per forward.
        inputs: what the model gets to see, as FinetuneConfig.inputs.
        device: as hub.load_model_folder's.
        official: rank VQA's answers with the published arithmetic, as fine-tuning at `fidelity: official` does.
        limit: scenes used where entries are made of scenes, 0: all.
        workers: processes that read pictures, 0: this one.

    Raises:
        ValueError: bad entries (all of them are told), a folder of another task.
    """
    tokenizer = SimlaProcessor.from_pretrained(folder).tokenizer
    listed = answers or folder / ANSWERS
    known = read_answers(listed) if task == "vqa" and (answers or listed.is_file()) else []
    downstream = make_task(task, tokenizer, known, official=official)
    network, model = load_model_folder(folder, downstream.network, device)
    entries = downstream.checked(load_annotations(task, source, image_root, limit=limit), train=False)
    for remark in downstream.remarks(entries):
        print(remark, file=sys.stderr)
    data = FinetuneData(max_tokens=tokenizer.max_tokens, workers=workers)
    config = FinetuneConfig(model=model, data=data, inputs=inputs)
    maker = ExampleMaker(config, downstream, tokenizer, train=False)
    predictions = downstream.predictions(network, held_out_batches(entries, maker, batch_size, data))
    return downstream.measures(entries.entries, predictions), predictions, entries


def write_predictions(file: Path, annotations: Annotations, predictions: list[dict[str, Any]]) -> None:
    """Write a JSON line per prediction, the entry's own keys under `given`."""
    lines = [json.dumps({**said, "given": annotations.entries[said["entry"]]}) + "\n" for said in predictions]
    file.write_text("".join(lines), encoding="utf-8")
