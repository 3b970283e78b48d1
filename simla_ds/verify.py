"""Re-run a recorded training step with the training classes and compare every number.  (`simla verify`)

A recording is a folder: config.json (sizes and what was run), weights.safetensors (state before the step, published
names), inputs.safetensors (batch, queues and the random draws), and one file of expected tensors per run. Injected are
only the recorded draws; everything else is what training does, in `official` fidelity. Works without deepspeed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simla_ds.config import (
    Config,
    ContrastiveConfig,
    ModelConfig,
    ObjectivesConfig,
    PseudoLabelConfig,
    StreamConfig,
    TeacherConfig,
    TrainConfig,
    VisionConfig,
    VocabularyConfig,
)
from simla_ds.model.official_names import our_name, split_teacher, translate
from simla_ds.model.simla import Simla
from simla_ds.model.weight_decay import parameter_groups
from simla_ds.objectives import FeatureQueue
from simla_ds.objectives.itc import similarities
from simla_ds.objectives.psl import PseudoLabelledKeywords
from simla_ds.task import PretrainTask
from simla_ds.teacher import ModuleSource, Teacher
from simla_ds.types import Batch, StepFeatures

LOSS_NAMES = {"ita": "itc", "itm": "itm", "mlm": "mlm", "mim": "xmm", "psl": "psl"}
"""Published name of each loss, and ours."""

QUEUE_NAMES = {"image_queue": "image", "text_queue": "text"}

REQUIRED = ("model", "special", "grad_norm_names")
"""What config.json must hold for a step to be run again; a pretraining step also PRETRAINING, others their alpha."""

PRETRAINING = ("batch", "adamw", "runs")

NOISE = 1e-6
"""A gradient below this share of the file's largest one is rounding noise around a true zero (attention's key biases;
the published MLM loss's word bias at alpha 1): it is compared on the scale of the largest."""


@dataclass(frozen=True)
class Comparison:
    """One compared tensor: its largest error relative to the recorded tensor's largest magnitude."""

    name: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the limit (NaN is not)."""
        return self.error <= self.limit


def verify_reference(
    folder: Path,
    *,
    loss_tolerance: float = 1e-5,
    tolerance: float = 1e-4,
    passes: Literal["fast", "plain"] = "fast",
    json_out: Path | None = None,
) -> bool:
    """Compare every run of a recording, print a table, and return whether all of it is within tolerance.

    Args:
        folder: the recording.
        loss_tolerance: largest relative error of a loss.
        tolerance: largest error of a tensor, relative to its largest magnitude.
        passes: how the step is computed (train.passes).
        json_out: where to write the comparisons, if anywhere.

    Raises:
        ValueError: the folder is no recording that verify knows.
    """
    from simla_ds.verify_tasks import RecordedTaskStep  # which builds on this module

    description = _read_description(folder)
    kind = RecordedStep if description["kind"] == "pretrain_step" else RecordedTaskStep
    rows: list[tuple[str, Comparison]] = []
    for file, run in description["runs"].items():
        step = kind(folder, description, alpha=float(run["alpha"]), passes=passes)
        expected = read_recorded(folder / file)
        rows += [(file, c) for c in step.compare(expected, loss_tolerance, tolerance)]
    _print_table(rows)
    if json_out is not None:
        json_out.write_text(json.dumps([{"run": file, **asdict(c), "holds": c.holds} for file, c in rows], indent=1))
    return bool(rows) and all(c.holds for _, c in rows)


def _read_description(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "weights.safetensors", "inputs.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no recording: {name} is missing")
    try:
        description = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder} is no recording: config.json is no JSON ({error})") from None
    from simla_ds.verify_tasks import KINDS

    kind = description.get("kind", "pretrain_step") if isinstance(description, dict) else type(description).__name__
    if kind not in ("pretrain_step", *KINDS):
        known = ", ".join(f"'{name}'" for name in ("pretrain_step", *KINDS))
        raise ValueError(f"{folder} records a step of '{kind}'; verify knows {known}")
    needed = (*REQUIRED, *(PRETRAINING if kind == "pretrain_step" else ("alpha",)))
    if absent := [key for key in needed if key not in description]:
        raise ValueError(f"{folder} is no recording of a '{kind}' step: config.json lacks {', '.join(absent)}")
    description = {"runs": {"expected.safetensors": {"alpha": description.get("alpha")}}, **description, "kind": kind}
    if absent := [file for file in description["runs"] if not (folder / file).is_file()]:
        raise ValueError(f"{folder} is no whole recording: {', '.join(absent)} missing, which config.json's runs name")
    return description


class _Tensors(dict[str, Tensor]):
    """A file's tensors; one that is missing is a ValueError with both names."""

    def __init__(self, file: Path, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.file = file

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"{self.file} holds no {name}: it is no whole recording")


def read_recorded(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a recording's file. ValueError when it cannot be read, or when one is not there."""
    try:
        return _Tensors(file, load_file(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from None


def recorded_config(description: dict[str, Any], passes: Literal["fast", "plain"] = "fast") -> Config:
    """Build the training configuration that a recording's config.json describes.

    Not its temperature: that comes with the weights, and may lie outside the bounds that the step clamps it to.
    """
    sizes, special = description["model"], description["special"]
    model = ModelConfig(
        vision=VisionConfig(
            image_size=sizes["image_res"],
            patch_size=sizes["patch"],
            width=sizes["width"],
            layers=sizes["vit_depth"],
            heads=sizes["vit_heads"],
            mlp_ratio=sizes["vit_mlp_ratio"],
        ),
        stream=StreamConfig(
            layers=sizes["bert_layers"],
            width=sizes["width"],
            heads=sizes["heads"],
            intermediate_size=sizes["intermediate"],
            max_positions=sizes["max_pos"],
            dropout=sizes["dropout"],
        ),
        vocabulary=VocabularyConfig(size=sizes["vocab"], visual_size=sizes["vtok"], **special),
        projection_size=sizes["embed_dim"],
    )
    objectives = ObjectivesConfig(
        fidelity="official",
        itc=ContrastiveConfig(queue_size=sizes["queue"]),
        psl=PseudoLabelConfig(
            votes_per_head=description.get("psl_top_per_head", 4), keywords=description.get("psl_keywords", 5)
        ),
    )
    return Config(
        model=model,
        objectives=objectives,
        teacher=TeacherConfig(momentum=description.get("momentum", sizes["momentum"])),
        train=TrainConfig(batch_size=description.get("batch", TrainConfig.batch_size), passes=passes),
    )


class RecordedStep:
    """A recorded step, run once: everything that expected tensors are compared with."""

    def __init__(self, folder: Path, description: dict[str, Any], alpha: float, passes: Literal["fast", "plain"]):
        self.description = description
        self.config = recorded_config(description, passes)
        self.model, self.teacher = load_recorded_networks(
            read_recorded(folder / "weights.safetensors"), self.config, dropout=self.config.teacher_dropout
        )
        inputs = read_recorded(folder / "inputs.safetensors")
        self.queue = _recorded_queue(inputs, self.config)
        self.task = PretrainTask(self.model, self.teacher, self.queue, self.config)
        self.batch = recorded_batch(inputs)
        self._run(alpha)

    def _run(self, alpha: float) -> None:
        """EMA, forward, backward, queue, AdamW: the order of the published step."""
        self.model.train()
        self.model.temperature.clamp_()
        self.teacher.update(self.config.teacher_momentum(self.description["batch"]))
        result = self.task(self.batch, alpha=alpha, keep=True)
        result["loss"].backward()
        self.losses = {"total": result["loss"].detach(), **result["losses"]}
        # ITC's keys are views of the queue: they are read before it moves on
        self.details = details(self.task, self.batch, result["features"], result["outputs"])
        self.queue.push(**result["queue_rows"])
        self.temperature = self.model.temperature().detach().clone()  # `after` is recorded before the optimizer step
        self.gradients = self._gradients()
        adamw = self.description["adamw"]
        groups = parameter_groups(self.model, adamw["weight_decay"], official=True)
        torch.optim.AdamW(groups, lr=adamw["lr"], betas=(0.9, 0.999), eps=1e-8).step()

    def _gradients(self) -> dict[str, Tensor]:
        parameters = self.model.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters}

    def compare(self, expected: dict[str, Tensor], loss_tolerance: float, tolerance: float) -> list[Comparison]:
        """Compare with a file of expected tensors; a recorded name that nothing computes is an error."""
        rows = []
        largest = max((float(g.abs().max()) for name, g in expected.items() if name.startswith("grad.")), default=0.0)
        for name, wanted in expected.items():
            kind, _, rest = name.partition(".")
            if kind == "loss64":
                continue  # the same losses in float64; loss.* are the ones of this precision
            actual = self._actual(kind, rest, name)
            if rest == "psl_keyword_ids":
                error = 0.0 if _same_sets(actual, wanted) else 1.0
            else:
                noise = kind == "grad" and bool(wanted.abs().max() < NOISE * largest)
                error = _relative_error(actual, wanted, scale=largest if noise else None)
            rows.append(Comparison(name, error, loss_tolerance if kind == "loss" else tolerance))
        return rows

    def _actual(self, kind: str, rest: str, name: str) -> Tensor:
        """Return what training computed under a recorded name."""
        if kind == "loss":
            if (loss := LOSS_NAMES.get(rest, rest)) not in self.losses:
                raise ValueError(f"the recording holds {name}, which verify does not know")
            return self.losses[loss]
        if kind == "grad":
            return self.gradients[our_name(rest)]
        if kind == "grad_norms_all":
            names = self.description["grad_norm_names"]
            return torch.stack([self.gradients[our_name(n)].norm() for n in names])
        if kind == "adamw":
            return self.model.get_parameter(our_name(rest)).detach()
        if kind == "after":
            return self._after(rest)
        if kind == "dbg" and rest in self.details:
            return self.details[rest]
        raise ValueError(f"the recording holds {name}, which verify does not know")

    def _after(self, name: str) -> Tensor:
        if name in QUEUE_NAMES:
            return getattr(self.queue, QUEUE_NAMES[name]).T
        if name == "queue_ptr":
            return torch.tensor([self.queue.pointer])
        student_name, is_teacher = split_teacher(name)
        if is_teacher:
            return self.teacher.master[our_name(student_name)]
        if name == "temp":
            return self.temperature
        raise ValueError(f"the recording holds after.{name}, which verify does not know")


def load_recorded_networks(weights: dict[str, Tensor], config: Config, *, dropout: bool) -> tuple[Simla, Teacher]:
    """Build student and teacher and load published names, strictly: every parameter, and nothing left over."""
    published = translate(weights)
    model = Simla(config.model)
    # the tied decoder is one parameter under two names
    tied = {"language_head.decoder.weight": published.student["stream.embeddings.word.weight"]}
    model.load_state_dict({**published.student, **tied}, strict=True)
    teacher = Teacher(model, dropout=dropout).follow(ModuleSource(model))
    # the published teacher has no copy of itm_head and temp: those stay the student's
    teacher.load_state_dict({**teacher.state_dict(), **published.teacher})
    return model, teacher


def recorded_batch(inputs: dict[str, Tensor]) -> Batch:
    """Turn recorded inputs into a Batch; the recorded draws stand in for what the loader would draw."""
    ids, patch_mask, labels = inputs["input_ids"], inputs["masked_visual_token_pos"].bool(), inputs["mlm_labels"]
    label_index = (labels.flatten() != -100).nonzero().flatten()
    masked_index = patch_mask.flatten().nonzero().flatten()
    rows = torch.arange(ids.shape[0])
    mask = inputs["attention_mask"].bool()
    return Batch(
        image=inputs["image"],
        input_ids=ids,
        text_mask=mask,
        token_index=mask.flatten().nonzero().flatten(),
        lengths=mask.sum(1),
        word_index=torch.arange(ids.shape[1]).expand_as(ids),
        mlm_input_ids=inputs["mlm_input_ids"],
        label_index=label_index,
        labels=labels.flatten()[label_index],
        label_count=torch.tensor([float(max(1, len(label_index)))]),
        patch_mask=patch_mask,
        masked_index=masked_index,
        masked_count=torch.tensor([float(max(1, len(masked_index)))]),
        visual_ids=inputs["visual_token_ids"],
        sample_id=rows,
        image_id=rows,
        itm_draws=torch.zeros(len(rows), 2),
        negative_image=inputs["neg_image_idx"],
        negative_text=inputs["neg_text_idx"],
    )


def _recorded_queue(inputs: dict[str, Tensor], config: Config) -> FeatureQueue:
    queue = FeatureQueue(config.objectives.itc.queue_size, config.model.projection_size)
    queue.image.copy_(inputs["image_queue"].T)
    queue.text.copy_(inputs["text_queue"].T)
    queue.pointer, queue.filled = int(inputs["queue_ptr"]), queue.size
    return queue


@torch.no_grad()
def details(task: PretrainTask, batch: Batch, features: StepFeatures, outputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return intermediate results under the names that recordings use."""
    student, teacher = features.student, features.teacher
    image_to_text, text_to_image = similarities(student, features.keys)
    model, first = task.model, batch["patch_mask"][0]
    masked_of_first = int(first.sum())
    mlm_hidden = outputs["mlm"][1].flatten(0, 1).index_select(0, batch["label_index"])
    psl, attention = task.objectives["psl"], outputs["psl"][0]
    assert isinstance(psl, PseudoLabelledKeywords)  # the dictionary of objectives knows only Objective
    hard = psl.targets(batch, attention)
    positions, _ = psl.keyword_positions(batch, attention)
    voters = min(psl.config.psl.votes_per_head, attention.shape[-1])
    counts = psl.count_votes(attention.topk(voters, dim=-1).indices, attention.shape[-1])
    if student.masked_image_tokens is None:
        raise RuntimeError("a recorded step has XMM on")
    return {
        "image_embeds": student.image_tokens,
        "image_feat": student.image_feature,
        "image_feat_m": teacher.image_feature,
        "text_feat": student.text_feature,
        "text_feat_m": teacher.text_feature,
        "sim_i2t": image_to_text,
        "sim_t2i": text_to_image,
        "itm_logits": model.match_head(torch.cat([outputs["itm"][0], outputs["itm"][1]])),
        "mlm_logits_masked_positions": model.language_head(mlm_hidden),
        "masked_image_embeds_first_sample": student.masked_image_tokens[0],
        "xmm_bert_out_first_sample": model.image_over_text(
            student.masked_image_tokens[:1], student.text_embeddings[:1], batch["text_mask"][:1]
        )[0],
        "xmm_logits_masked_first_sample": model.visual_head(outputs["xmm"][0][:masked_of_first]),
        "xmm_logits_m_masked_first_sample": task.teacher.module.visual_head(outputs["xmm"][1][:masked_of_first]),
        "psl_cls_attention": attention,
        "psl_counts": counts,
        "psl_keyword_ids": batch["input_ids"].gather(1, positions),
        "psl_hard_nonzero": hard.nonzero(),
        "psl_logits": model.concept_head(student.image_feature),
        "psl_soft_targets": task.teacher.module.concept_head(teacher.image_feature).sigmoid(),
    }


def _relative_error(actual: Tensor, wanted: Tensor, scale: float | None = None) -> float:
    """Return max|a - b| / max|b| (or / scale); infinite when the shapes do not fit."""
    if actual.numel() != wanted.numel() or (wanted.dim() > 1 and actual.shape != wanted.shape):
        return float("inf")
    if not wanted.numel():
        return 0.0
    actual, wanted = actual.detach().double().reshape(wanted.shape), wanted.double()
    scale = max(float(wanted.abs().max()), torch.finfo(torch.float32).tiny) if scale is None else scale
    return float((actual - wanted).abs().max()) / scale


def _same_sets(actual: Tensor, wanted: Tensor) -> bool:
    return [set(r) for r in actual.tolist()] == [set(r) for r in wanted.tolist()]


def _print_table(rows: list[tuple[str, Comparison]]) -> None:
    width = max((len(c.name) for _, c in rows), default=4)
    run = None
    for file, c in rows:
        if file != run:
            print(f"{file}\n  {'tensor':<{width}}  error/max   limit")
            run = file
        print(f"  {c.name:<{width}}  {c.error:9.2e}  {c.limit:7.0e}  {'ok' if c.holds else 'FAILS'}")
    failed = sum(not c.holds for _, c in rows)
    print(f"{len(rows)} compared, {len(rows) - failed} within tolerance, {failed} not")
