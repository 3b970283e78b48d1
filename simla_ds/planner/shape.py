"""How much there is to compute in one micro-batch of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from simla_ds.config import Config
from simla_ds.types import Batch

CAPTION_TOKENS = 13.5
"""Mean tokens of a COCO caption: 10.5 words of 1.1 pieces each, [CLS] and [SEP]."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes that operations and activations depend on."""

    pairs: int
    """B."""
    tokens: float
    """T, real tokens of all captions."""
    longest: int
    """L, slots of a caption."""
    labelled: float
    """M, tokens that MLM predicts."""
    masked: float
    """K, patches that XMM predicts."""

    @classmethod
    def expected(cls, config: Config, caption_tokens: float = CAPTION_TOKENS) -> StepShape:
        """Return what a batch of train.batch_size pairs has on average; its longest caption has data.max_tokens."""
        pairs, tokens = config.train.batch_size, caption_tokens * config.train.batch_size
        return cls(
            pairs=pairs,
            tokens=tokens,
            longest=config.data.max_tokens,
            labelled=config.objectives.mlm.probability * tokens,
            masked=config.objectives.xmm.mask_ratio * config.model.vision.patches * pairs,
        )

    @classmethod
    def of(cls, batch: Batch) -> StepShape:
        """Return a batch's own."""
        return cls(
            pairs=len(batch["input_ids"]),
            tokens=len(batch["token_index"]),
            longest=batch["input_ids"].shape[1],
            labelled=len(batch["label_index"]),
            masked=len(batch["masked_index"]),
        )
