"""A model small enough to run in milliseconds, with weights large enough that every part of it matters."""

from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from simla_ds.config import (
    Config,
    ContrastiveConfig,
    ModelConfig,
    ObjectivesConfig,
    StreamConfig,
    TeacherConfig,
    TrainConfig,
    VisionConfig,
    VocabularyConfig,
)
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.task import PretrainTask
from simla_ds.teacher import ModuleSource, Teacher
from simla_ds.types import Batch

M = TypeVar("M", bound=nn.Module)
QUEUE = 8
VISION = VisionConfig(image_size=24, patch_size=8, width=32, layers=2, heads=4)  # 3 x 3 patches
STREAM = StreamConfig(layers=2, width=32, heads=4, intermediate_size=48, max_positions=40, dropout=0.0)
ALBEF = StreamConfig(
    shared=False,
    text_layers=1,
    fusion_layers=2,
    token_types=True,
    width=32,
    heads=4,
    intermediate_size=48,
    max_positions=40,
    dropout=0.0,
)


def model_config(stream: StreamConfig = STREAM) -> ModelConfig:
    """Return the tiny model's configuration: 50 words, 20 visual tokens."""
    vocabulary = VocabularyConfig(size=50, visual_size=20)
    return ModelConfig(vision=VISION, stream=stream, vocabulary=vocabulary, projection_size=16)


def run_config(
    passes: Literal["fast", "plain"] = "fast",
    stream: StreamConfig = STREAM,
    only: str = "",
    teacher: TeacherConfig = TeacherConfig(),  # noqa: B008  frozen, so all calls may share one
    **objectives: Any,
) -> Config:
    """Return a run's configuration; keywords go to ObjectivesConfig (itc is given a queue of 8 unless named).

    `only` switches all objectives but one off.
    """
    chosen = ObjectivesConfig(**{"itc": ContrastiveConfig(queue_size=QUEUE), **objectives})
    if only:
        off = {name: replace(getattr(chosen, name), weight=0.0) for name in chosen.enabled if name != only}
        chosen = replace(chosen, **off)
    return Config(
        model=model_config(stream),
        objectives=chosen,
        teacher=teacher,
        train=TrainConfig(batch_size=4, passes=passes),
    )


@torch.no_grad()
def spread_weights(module: M, seed: int = 0) -> M:
    """Draw weights that keep activations of order one (the start values hide mistakes), and return the module."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if name.endswith("temperature.value"):
            continue
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return module


def make_task(config: Config, seed: int = 0) -> PretrainTask:
    """Return a task whose teacher differs from its student and whose queue is full."""
    student, teacher_start = Simla(config.model), Simla(config.model)
    spread_weights(student, seed)
    teacher = Teacher(student, dropout=config.teacher_dropout).follow(ModuleSource(student))
    spread_weights(teacher_start, seed + 1)
    for name, parameter in teacher_start.named_parameters():
        teacher.master[name].lerp_(parameter.detach(), 0.3)
    queue = FeatureQueue.random(config.objectives.itc.queue_size, config.model.projection_size, seed)
    return PretrainTask(student, teacher, queue, config)


def make_batch(lengths: list[int], *, pad_to: int = 0, seed: int = 0) -> Batch:
    """Return a batch of captions of these lengths with [CLS] and [SEP], every draw fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    rows, count, longest = torch.tensor(lengths), len(lengths), max([*lengths, pad_to])
    mask = torch.arange(longest) < rows[:, None]
    ids = 5 + (random(count, 64)[:, :longest] * 45).long()  # drawn 64 wide: padding more draws the same words
    ids[:, 0] = 2
    ids[torch.arange(count), rows - 1] = 3
    ids = ids.masked_fill(~mask, 0)
    words = torch.arange(longest).expand(count, -1).masked_fill(~mask | (ids < 5), -1)
    chosen = (random(count, 64)[:, :longest] < 0.4) & (ids >= 5)
    patch_mask = random(count, VISION.patches).argsort(1) < 4
    image, visual_ids = torch.randn(count, 3, 24, 24, generator=generator), (random(count, 9) * 20).long()
    draws = random(count, 2)
    return with_masks(
        Batch(
            image=image,
            input_ids=ids,
            text_mask=mask,
            token_index=torch.empty(0),
            lengths=rows,
            word_index=words,
            mlm_input_ids=ids.masked_fill(chosen, 4),
            label_index=torch.empty(0),
            labels=torch.empty(0),
            label_count=torch.empty(0),
            patch_mask=patch_mask,
            masked_index=torch.empty(0),
            masked_count=torch.empty(0),
            visual_ids=visual_ids,
            sample_id=torch.arange(count),
            image_id=torch.arange(count),
            itm_draws=draws,
        ),
        chosen,
        patch_mask,
    )


def with_masks(batch: Batch, chosen: Tensor, patch_mask: Tensor) -> Batch:
    """Return the batch with these (B, L) tokens labelled and these (B, P) patches hidden, counts of a lone batch."""
    label_index, masked_index = chosen.flatten().nonzero()[:, 0], patch_mask.flatten().nonzero()[:, 0]
    return {
        **batch,
        "token_index": batch["text_mask"].flatten().nonzero()[:, 0],
        "mlm_input_ids": batch["input_ids"].masked_fill(chosen, 4),
        "label_index": label_index,
        "labels": batch["input_ids"].flatten()[label_index],
        "label_count": torch.tensor([float(max(1, len(label_index)))]),
        "patch_mask": patch_mask,
        "masked_index": masked_index,
        "masked_count": torch.tensor([float(max(1, len(masked_index)))]),
    }


def labelled(batch: Batch) -> Tensor:
    """Return the labelled tokens as (B, L) bool."""
    chosen = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    chosen[batch["label_index"]] = True
    return chosen.view_as(batch["input_ids"])
