"""What a cell's training computes, counted on its own batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.counting import Operations
from simla_ds.config import Config
from simla_ds.data.batch import as_floats
from simla_ds.data.loader import PairLoader
from simla_ds.data.text import TextTokenizer
from simla_ds.data.visual_tokens import load_visual_tokenizer
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.task import PretrainTask
from simla_ds.teacher import ModuleSource, Teacher
from simla_kernels.dispatch import forced

COUNTED_STEPS = 4
"""Steps that the mean is taken over; their captions differ in length."""


def step_gflop(config: Config, ranks: int, pairs: int, device: str = "cpu") -> float:
    """Return the operations of an optimizer step in 10^9: counted on real batches, products and convolutions only.

    Forward of student and teacher and the student's backward; neither the optimizer nor the visual tokeniser. On a card
    PyTorch's own operations are counted: within a Triton kernel nothing can be.
    """
    tokenizer = TextTokenizer(
        Path(config.data.tokenizer), max_tokens=config.data.max_tokens, add_sep=config.model.vocabulary.add_sep
    )
    codes = load_visual_tokenizer(config.data.visual_tokenizer, config.model.vision.grid).to(device)
    loader = PairLoader(config, tokenizer, codes.view_size)
    if loader.epoch_size != pairs:
        raise RuntimeError(f"{config.data.train} holds {loader.epoch_size} pairs, the cell is one of {pairs}")
    model = Simla(config.model).to(device)
    queue = FeatureQueue.random(config.objectives.itc.queue_size, config.model.projection_size).to(device)
    teacher = Teacher(model, dropout=False, device=device).follow(ModuleSource(model))
    task = PretrainTask(model, teacher, queue, config).train()
    count = COUNTED_STEPS * config.objectives.xmm.every
    with forced("torch"), Operations() as operations:
        for step in range(count):
            moved: Any = {name: value.to(device) for name, value in next(loader).items()}
            batch: Any = as_floats(moved)
            batch["visual_ids"] = codes(batch.pop("visual_view"))
            task(batch, alpha=config.objectives.alpha, step=step)["loss"].backward()
    loader.close()
    return 1e-9 * operations.total / count * config.train.grad_accumulation * ranks
