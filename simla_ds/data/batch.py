"""From a sample's files to a training pair, and from pairs to a Batch.

Every random choice about a pair comes from the one generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from simla_ds.config import Config, VocabularyConfig
from simla_ds.data.masking import block_mask, mask_tokens
from simla_ds.data.sample import clean_caption, open_picture, picture_bytes, read_record
from simla_ds.data.transforms import make_transform, normalise
from simla_ds.types import Batch


class Tokenizer(Protocol):
    """What is asked of a text tokeniser (simla_ds.data.text.TextTokenizer)."""

    @property
    def vocabulary(self) -> VocabularyConfig:
        """Size and special ids."""
        ...

    def encode(self, caption: str) -> tuple[list[int], list[int]]:
        """Token ids with [CLS], truncated, and each token's word number, -1 at special tokens."""
        ...


@dataclass
class Pair:
    """One picture and caption, ready to be collated. L is this caption's own length."""

    key: str
    caption: str
    """Cleaned."""
    image: Tensor | None
    """(3, S, S) uint8. None on the way from a worker, where the views of several pairs travel as one tensor."""
    visual_view: Tensor | None
    """(3, V, V) uint8, or None when none is made."""
    input_ids: np.ndarray
    """(L,) int64."""
    word_index: np.ndarray
    """(L,) int64."""
    mlm_input_ids: np.ndarray
    """(L,) int64."""
    labelled: np.ndarray
    """(L,) bool."""
    patch_mask: np.ndarray
    """(P,) bool."""
    sample_id: int
    image_id: int
    itm_draws: np.ndarray
    """(2,) float32."""
    source: int | None = None
    """Number of the source, where several are mixed."""


class PairMaker:
    """Turns the members of a sample into a Pair."""

    def __init__(self, config: Config, tokenizer: Tokenizer, visual_view_size: int, train: bool):
        """visual_view_size: side of the visual tokeniser's view in pixels, 0 for none. train: crop, flip, augment."""
        self.config, self.tokenizer = config, tokenizer
        self.transform = make_transform(config, visual_view_size, train=train)

    def make(self, key: str, members: Mapping[str, bytes | None], rng: np.random.Generator, salt: int = 0) -> Pair:
        """Read, transform, tokenise and mask one sample; salt as read_record's. Raises SkipSample."""
        record = read_record(key, members, salt)
        picture = open_picture(picture_bytes(members))
        raw = record.captions[int(rng.integers(len(record.captions)))]
        caption = clean_caption(raw, self.config.data.max_words)
        image, visual_view = self.transform(picture, caption, rng)
        ids, words = (np.array(numbers, dtype=np.int64) for numbers in self.tokenizer.encode(caption))
        vocabulary, objectives = self.tokenizer.vocabulary, self.config.objectives
        patch_mask = block_mask(self.config.model.vision.grid, objectives.xmm.mask_ratio, rng)
        mlm_input_ids, labelled = mask_tokens(
            ids,
            rng,
            special=vocabulary.special,
            mask_id=vocabulary.mask,
            vocabulary_size=vocabulary.size,
            probability=objectives.mlm.probability,
        )
        return Pair(
            key=key,
            caption=caption,
            image=torch.from_numpy(image),
            visual_view=None if visual_view is None else torch.from_numpy(visual_view),
            input_ids=ids,
            word_index=words,
            mlm_input_ids=mlm_input_ids,
            labelled=labelled,
            patch_mask=patch_mask,
            sample_id=record.sample_id,
            image_id=record.image_id,
            itm_draws=rng.random(2, dtype=np.float32),
        )


def collate(pairs: list[Pair], vocabulary: VocabularyConfig, pad_to: int = 0) -> Batch:
    """Stack pairs into a Batch padded to the longest caption, at least to pad_to; pinned where CUDA is there.

    Its pictures are uint8 still: they travel so to the device, where `as_floats` makes them what types.Batch says.
    """
    lengths = torch.tensor([len(pair.input_ids) for pair in pairs])
    text_mask = torch.arange(max(pad_to, int(lengths.max()))) < lengths[:, None]
    labelled = _padded([pair.labelled for pair in pairs], text_mask, False)
    input_ids = _padded([pair.input_ids for pair in pairs], text_mask, vocabulary.pad)
    patch_mask = torch.from_numpy(np.stack([pair.patch_mask for pair in pairs]))
    label_index, masked_index = labelled.view(-1).nonzero()[:, 0], patch_mask.view(-1).nonzero()[:, 0]
    batch: Batch = {
        "image": torch.stack([pair.image for pair in pairs if pair.image is not None]),
        "input_ids": input_ids,
        "text_mask": text_mask,
        "token_index": text_mask.view(-1).nonzero()[:, 0],
        "lengths": lengths,
        "word_index": _padded([pair.word_index for pair in pairs], text_mask, -1),
        "mlm_input_ids": _padded([pair.mlm_input_ids for pair in pairs], text_mask, vocabulary.pad),
        "label_index": label_index,
        "labels": input_ids.view(-1)[label_index],
        "label_count": torch.tensor([float(len(label_index))]),
        "patch_mask": patch_mask,
        "masked_index": masked_index,
        "masked_count": torch.tensor([float(len(masked_index))]),
        "sample_id": torch.tensor([pair.sample_id for pair in pairs]),
        "image_id": torch.tensor([pair.image_id for pair in pairs]),
        "itm_draws": torch.from_numpy(np.stack([pair.itm_draws for pair in pairs])),
    }
    views = [pair.visual_view for pair in pairs if pair.visual_view is not None]
    if pairs[0].source is not None:
        batch["source"] = torch.tensor([pair.source for pair in pairs])
    if views:
        batch["visual_view"] = torch.stack(views)
    if torch.cuda.is_available():
        return cast(Batch, {name: cast(Tensor, tensor).pin_memory() for name, tensor in batch.items()})
    return batch


def as_floats(batch: Batch) -> Batch:
    """Return a collated batch with its uint8 pictures as the floats that the step reads, on the device they are on."""
    batch = {**batch, "image": normalise(batch["image"])}
    if "visual_view" in batch:
        batch["visual_view"] = batch["visual_view"].float().div_(255)
    return batch


def _padded(rows: list[np.ndarray], mask: Tensor, value: int | bool) -> Tensor:
    """Rows of different lengths as (B, L), `value` where mask is False."""
    flat = torch.from_numpy(np.concatenate(rows))
    return torch.full(mask.shape, value, dtype=flat.dtype).masked_scatter_(mask, flat)
