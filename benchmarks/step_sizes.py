"""What the step benchmarks run: model sizes, and batches of random pictures with captions as long as COCO's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.timing import CPU
from simla_ds.config import (
    Config,
    ContrastiveConfig,
    ModelConfig,
    ObjectivesConfig,
    StreamConfig,
    TrainConfig,
    VisionConfig,
    VocabularyConfig,
)
from simla_ds.data.batch import Pair, as_floats, collate
from simla_ds.data.masking import block_mask, mask_tokens
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.task import PretrainTask
from simla_ds.teacher import ModuleSource, Teacher
from simla_ds.types import Batch

VOCABULARY = VocabularyConfig(size=30_522, visual_size=8_192, pad=0, unk=100, cls=101, sep=102, mask=103)
"""bert-base-uncased's and the DALL-E dVAE's."""
LONGEST = 25
COCO_TOKENS = (13.5, 2.7)
"""Mean and spread of a COCO caption's tokens: 10.5 words (spread 2.4) of 1.1 pieces each, [CLS] and [SEP]."""


def _config(batch: int, image_size: int, width: int, vision_layers: int, heads: int, queue: int) -> Config:
    vision = VisionConfig(image_size=image_size, patch_size=16, width=width, layers=vision_layers, heads=heads)
    stream = StreamConfig(layers=12, width=width, heads=heads, intermediate_size=4 * width, max_positions=512)
    return Config(
        model=ModelConfig(vision=vision, stream=stream, vocabulary=VOCABULARY, projection_size=256),
        objectives=ObjectivesConfig(itc=ContrastiveConfig(queue_size=queue)),
        train=TrainConfig(batch_size=batch),
    )


SIZES = {
    "full": _config(batch=4, image_size=256, width=768, vision_layers=12, heads=12, queue=65_536),
    "small": _config(batch=16, image_size=128, width=256, vision_layers=6, heads=4, queue=65_536),
    "tiny": _config(batch=4, image_size=64, width=64, vision_layers=2, heads=2, queue=64),
}
"""full: ViT-B/16 at 256 px and a BERT-base stack (SIMLA's). tiny: to try the benchmark itself."""


def changed(config: Any, **settings: Any) -> Any:
    """Return a configuration with dotted settings replaced, dots written as `__`; all at once, then checked."""
    replaced: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, rest = name.partition("__")
        if rest:
            inner.setdefault(section, {})[rest] = value
        else:
            replaced[name] = value
    replaced |= {section: changed(getattr(config, section), **of) for section, of in inner.items()}
    return replace(config, **replaced)


def make_task(config: Config, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> PretrainTask:
    """Return a task with random weights, the same on every device, and a full queue, in training mode."""
    torch.manual_seed(0)
    model = Simla(config.model).to(device, dtype)
    teacher = Teacher(model, dropout=config.teacher_dropout, dtype=dtype, device=device).follow(ModuleSource(model))
    queue = FeatureQueue.random(config.objectives.itc.queue_size, config.model.projection_size).to(device)
    return PretrainTask(model, teacher, queue, config).train()


def make_batch(config: Config, seed: int = 0, *, tokens: int = 0, device: torch.device = CPU) -> Batch:
    """Return a batch of random pictures and captions; `tokens` > 0 gives every caption that length."""
    rng = np.random.default_rng(seed)
    model, objectives = config.model, config.objectives
    pairs = []
    for number in range(config.train.batch_size):
        length = tokens or int(np.clip(round(rng.normal(*COCO_TOKENS)), 5, LONGEST))
        ids = rng.integers(model.vocabulary.mask + 1, model.vocabulary.size, length)
        ids[0], ids[-1] = model.vocabulary.cls, model.vocabulary.sep
        masked, labelled = mask_tokens(
            ids,
            rng,
            special=model.vocabulary.special,
            mask_id=model.vocabulary.mask,
            vocabulary_size=model.vocabulary.size,
            probability=objectives.mlm.probability,
        )
        side = model.vision.image_size
        pairs.append(
            Pair(
                key=str(number),
                caption="",
                image=torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8)),
                visual_view=None,
                input_ids=ids,
                word_index=np.arange(length),
                mlm_input_ids=masked,
                labelled=labelled,
                patch_mask=block_mask(model.vision.grid, objectives.xmm.mask_ratio, rng),
                sample_id=number,
                image_id=number,
                itm_draws=rng.random(2, dtype=np.float32),
            )
        )
    batch = as_floats(collate(pairs, model.vocabulary))
    codes = rng.integers(0, model.vocabulary.visual_size, (len(pairs), model.vision.patches))
    batch["visual_ids"] = torch.from_numpy(codes)
    tensors: Any = batch
    return Batch(**{name: value.to(device) for name, value in tensors.items()})


def with_negatives(batch: Batch) -> Batch:
    """Return the batch with fixed wrong pictures and captions: the next pair's, and the one's after it."""
    own = torch.arange(len(batch["image"]), device=batch["image"].device)
    return {**batch, "negative_image": own.roll(-1), "negative_text": own.roll(1)}
