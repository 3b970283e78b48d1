"""Recorded steps of fine-tuning, run again by the classes that fine-tune.  (`simla verify`, with simla_ds.verify)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from simla_ds.config import ModelConfig, TeacherConfig
from simla_ds.downstream.base import Downstream
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.downstream.nlvr2 import Nlvr2
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.downstream.snli_ve import SnliVe
from simla_ds.downstream.vqa import Vqa
from simla_ds.model.official_names import translate
from simla_ds.teacher import ModuleSource, Teacher
from simla_ds.verify import RecordedStep, read_recorded, recorded_config

KINDS: dict[str, Callable[[], Downstream]] = {
    "retrieval": Retrieval,
    "vqa": lambda: Vqa(official=True),
    "nlvr": Nlvr2,
    "ve": SnliVe,
}
"""What config.json calls a recording, and the task that it is a step of."""

NOT_PUBLISHED = ("image_encoder.mask_token", "language_head.", "visual_head.", "concept_head.")
"""Parameters that no published downstream model has."""


class RecordedTaskStep(RecordedStep):
    """A recorded fine-tuning step, run once. No optimizer step was recorded."""

    def __init__(self, folder: Path, description: dict[str, Any], alpha: float, passes: Literal["fast", "plain"]):
        self.description = description
        weights, inputs = (read_recorded(folder / f"{name}.safetensors") for name in ("weights", "inputs"))
        self.downstream = KINDS[description["kind"]]()
        self.config = _config(description, weights, passes)
        self.model, self.teacher = _load_networks(self.downstream, self.config.model, weights)
        self.task: Any = self.downstream.module(self.model, self.teacher, self.config)
        self.queue = self.task.queue
        if "image_queue" in weights:
            self.queue.image.copy_(weights["image_queue"].T)
            self.queue.text.copy_(weights["text_queue"].T)
            self.queue.image_id.copy_(weights["idx_queue"].flatten())
            self.queue.pointer, self.queue.filled = int(weights["queue_ptr"]), self.queue.size
        self.batch = _batch(inputs)
        self._run(alpha)

    def _run(self, alpha: float) -> None:
        """EMA, forward, backward, queue: the order of the published step."""
        self.model.train()
        if hasattr(self.model, "temperature"):
            self.model.temperature.clamp_()
        self.teacher.update(self.config.teacher.momentum)
        result = self.task(self.batch, alpha=alpha)
        result["loss"].backward()
        if self.queue.size:
            self.queue.push(**result["queue_rows"])
        self.losses = {"total": result["loss"].detach(), **result["losses"]}
        self.details = {}
        self.gradients = self._gradients()

    def _after(self, name: str) -> Tensor:
        if name == "idx_queue":
            return self.queue.image_id[None]
        return super()._after(name)


def _config(
    description: dict[str, Any], weights: dict[str, Tensor], passes: Literal["fast", "plain"]
) -> FinetuneConfig:
    base = recorded_config(description, passes)
    types = "text_encoder.embeddings.token_type_embeddings.weight" in weights
    return FinetuneConfig(
        model=replace(base.model, stream=replace(base.model.stream, token_types=types)),
        objectives=base.objectives,
        teacher=TeacherConfig(momentum=description.get("momentum", description["model"]["momentum"])),
        train=base.train,
    )


def _load_networks(downstream: Downstream, config: ModelConfig, weights: dict[str, Tensor]) -> tuple[Any, Teacher]:
    """Build student and teacher and load published names: all that there are, and nothing left over."""
    published = translate(weights)
    model = downstream.network(config)
    state = dict(published.student)
    for embeddings in ("stream.embeddings.word.weight", "decoder.embeddings.word.weight"):
        if "language_head.transform.weight" in state and embeddings in state:
            state["language_head.decoder.weight"] = state[embeddings]  # one parameter under two names
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.startswith(NOT_PUBLISHED)]
    if lost or unexpected:
        raise ValueError(
            f"weights.safetensors lacks {lost[:3]} and has unknown {unexpected[:3]}: sizes of config.json?"
        )
    teacher = Teacher(model, dropout=True).follow(ModuleSource(model))
    copies = {name: value for name, value in published.teacher.items() if name in teacher.master}  # tied: once
    teacher.load_state_dict({**teacher.state_dict(), **copies})
    return model, teacher


def _batch(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Turn recorded inputs into a task's batch; the recorded draws stand in for what the loader would draw."""
    mask = inputs["attention_mask"].bool()
    batch: dict[str, Any] = {
        "image": inputs["image"],
        "input_ids": inputs["input_ids"],
        "text_mask": mask,
        "token_index": mask.flatten().nonzero()[:, 0],
    }
    if "targets" in inputs:
        batch["label"] = inputs["targets"]
    if "idx" in inputs:
        batch["image_id"] = inputs["idx"]
        batch["negative_image"], batch["negative_text"] = inputs["neg_image_idx"], inputs["neg_text_idx"]
    if "answer_ids" in inputs:
        answers = inputs["answer_mask"].bool()
        batch["answer_ids"], batch["answer_mask"] = inputs["answer_ids"], answers
        batch["answer_question"] = torch.arange(len(mask)).repeat_interleave(inputs["k"])
        batch["answer_weight"] = inputs["weights"]
        followed = answers & answers.roll(-1, 1)
        followed[:, -1] = False  # nothing follows the last word
        batch["answer_slots"] = followed.flatten().nonzero()[:, 0]
    return batch
