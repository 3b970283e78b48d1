"""Watching it learn: held-out measures, shares of the gradient, codes in use.

All of it runs on a plain copy of the student or on the teacher, never through the engine: DeepSpeed sees one forward
and one backward per micro-batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simla_ds.config import Config
from simla_ds.data.batch import as_floats
from simla_ds.data.text import TextTokenizer
from simla_ds.data.visual_tokens import VisualTokenizer
from simla_ds.engine.zero_teacher import Engine, EngineSource
from simla_ds.evaluation import HeldOut
from simla_ds.task import PretrainTask
from simla_ds.types import Batch


class Watch:
    """What is measured beside the training step."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        task: PretrainTask,
        source: EngineSource,
        tokenizer: TextTokenizer,
        visual_tokenizer: VisualTokenizer | None,
    ):
        self.config, self.engine, self.task, self.source = config, engine, task, source
        self.visual_tokenizer, self.device = visual_tokenizer, torch.device(engine.device or "cpu")
        codes = visual_tokenizer.vocabulary_size if visual_tokenizer else 0
        self.seen_codes = torch.zeros(codes, dtype=torch.bool, device=self.device)
        self.held_out = None
        if config.data.val and config.eval.every:
            self.held_out = HeldOut(config, tokenizer, visual_tokenizer, self.device)

    def prepare(self, batch: Batch) -> Batch:
        """Move a batch, pictures as uint8, to the device; make floats and visual tokens of them there."""
        tensors: dict[str, Any] = dict(batch)
        moved: Any = {name: value.to(self.device, non_blocking=True) for name, value in tensors.items()}
        moved = as_floats(moved)
        view = moved.pop("visual_view", None)
        if view is not None and self.visual_tokenizer is not None:
            moved["visual_ids"] = self.visual_tokenizer(view)
        return moved

    def saw(self, batch: Batch) -> None:
        """Take note of the visual codes in a prepared batch that is trained on."""
        if "visual_ids" in batch:
            self.seen_codes.index_fill_(0, batch["visual_ids"].flatten(), True)

    def monitor(self) -> dict[str, float]:
        """Return the share of visual codes that have occurred since the start, where visual tokens are read."""
        return {"visual_codes_used": float(self.seen_codes.float().mean())} if self.visual_tokenizer else {}

    def evaluate(self) -> dict[str, float]:
        """Return `eval/student/...` and `eval/teacher/...`; every rank must call it."""
        if self.held_out is None:
            raise RuntimeError("there are no held-out pairs to evaluate on")
        teacher, student = self.task.teacher, plain_student(self.task, self.engine, self.source)
        record = {}
        for role, network in (("student", student), ("teacher", teacher.module)):
            measures = self.held_out.measure(network, teacher)
            record.update({f"eval/{role}/{name}": value for name, value in measures.items()})
        return record

    @staticmethod
    def summary(record: dict[str, Any]) -> str:
        """Return a line for people."""
        get = {k.removeprefix("eval/student/"): v for k, v in record.items() if k.startswith("eval/student/")}
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in get.items() if k.startswith("loss/"))
        recall = " ".join(f"{k} {v:.1f}" for k, v in get.items() if k.endswith("/r1"))
        return f"step {record['step']} held out | {losses} | {recall}"

    def write_predictions(self, folder: Path) -> None:
        """Write nothing: held-out pairs have measures, but no predictions to look at."""

    def gradient_shares(self, batch: Batch, alpha: float) -> dict[str, float]:
        """Return each objective's share of the summed gradient norms at two places.

        `image_cls`: the image encoder's [CLS], of the clean and of the masked picture. `fused_cls`: the first row
        entering the stream's last layer, in every fused pass. Measured on the given batch, with the objectives'
        weights.
        """
        student = plain_student(self.task, self.engine, self.source)
        task = PretrainTask(student, self.task.teacher, self.task.queue, self.config)
        fused: list[tuple[Tensor, Tensor]] = []

        def keep(_module: Any, arguments: tuple[Any, ...]) -> None:
            x, rows, context, *_ = arguments
            if context is not None and x.requires_grad:
                fused.append((x, rows.first(x.device)))

        hook = student.stream.layers[-1].register_forward_pre_hook(keep)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # dropout here must not shift the training's draws
                features = task.features(batch)
                outputs = task.outputs(batch, features, task.objectives)
                losses = {n: o.loss(batch, features, outputs[n], alpha) for n, o in task.objectives.items()}
        finally:
            hook.remove()
        shares: dict[str, float] = {}
        images = [t for t in (features.student.image_tokens, features.student.masked_image_tokens) if t is not None]
        firsts = [(t, torch.arange(len(t), device=t.device) * t.shape[1]) for t in images]
        for place, read in (("image_cls", firsts), ("fused_cls", fused)):
            norms = {name: self._norm(name, loss, read) for name, loss in losses.items()}
            total = sum(norms.values()) or 1.0
            shares.update({f"gradient_share/{place}/{name}": norm / total for name, norm in norms.items()})
        return shares

    def _norm(self, name: str, loss: Tensor, read: list[tuple[Tensor, Tensor]]) -> float:
        """Norm of a weighted loss's gradient at some tokens, given as (..., D) tensors and flat positions in them.

        0 where there are none: contrast alone has no fused pass.
        """
        if not read:
            return 0.0
        weight = getattr(self.config.objectives, name).weight
        tensors = [tensor for tensor, _ in read]
        gradients = torch.autograd.grad(loss * weight, tensors, retain_graph=True, allow_unused=True)
        squares = [
            g.flatten(0, -2).index_select(0, places).float().square().sum()
            for g, (_, places) in zip(gradients, read, strict=True)
            if g is not None
        ]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def plain_student(task: Any, engine: Engine, source: EngineSource) -> Any:
    """Return the student without DeepSpeed's hooks: at ZeRO-3 a gathered copy (collective), else itself."""
    model = task.model
    if engine.zero_optimization_stage() < 3:
        return model
    with torch.random.fork_rng(devices=[]):  # what it draws to start with is overwritten, and must not shift dropout
        copy = type(model)(model.config).to(engine.device, task.teacher.dtype)
    source.fill(dict(copy.named_parameters()), source.shards())
    copy.set_activation_checkpointing(task.config.train.activation_checkpointing)
    return copy.train(model.training)
