"""Every tensor that crosses a module border, with its shape.

Letters used throughout: B pairs of this rank's micro-batch, L padded caption length, P patches (N = P + 1 with [CLS]),
D width, E projection width, H heads, M labelled tokens of the batch, K masked patches of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NotRequired, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """One micro-batch of one rank: a plain dict of tensors, since DeepSpeed's walkers know dict, list and tuple.

    It carries what would otherwise cost a device synchronisation: lengths, flat positions of labelled tokens and
    masked patches, ids and the uniform numbers that random choices inside the step are made from.
    """

    image: Tensor
    """(B, 3, S, S) float32, normalised: the encoder's view. Up to data.batch.as_floats uint8, as visual_view."""
    input_ids: Tensor
    """(B, L) int64 token ids, [CLS] first, padded to the longest caption of the batch."""
    text_mask: Tensor
    """(B, L) bool, True at real tokens."""
    token_index: Tensor
    """(T,) int64 flat positions in (B * L) of the T real tokens, ascending."""
    lengths: Tensor
    """(B,) int64 real tokens per caption."""
    word_index: Tensor
    """(B, L) int64 number of the word a token belongs to within its caption; -1 at special tokens and padding."""
    mlm_input_ids: Tensor
    """(B, L) int64 input_ids with some tokens masked."""
    label_index: Tensor
    """(M,) int64 flat positions in (B * L) that MLM predicts, ascending."""
    labels: Tensor
    """(M,) int64 the original ids at label_index."""
    label_count: Tensor
    """(1,) float32 what the sum over labelled tokens is divided by: their mean number per rank and micro-step of
    the optimizer step (the trainer fills it in; a lone batch has M)."""
    patch_mask: Tensor
    """(B, P) bool, True at patches hidden from the masked image pass."""
    masked_index: Tensor
    """(K,) int64 flat positions in (B * P) that XMM predicts, ascending."""
    masked_count: Tensor
    """(1,) float32 as label_count, for masked patches."""
    visual_ids: NotRequired[Tensor]
    """(B, P) int64 visual-token ids; made from visual_view by the visual tokeniser before the step."""
    visual_view: NotRequired[Tensor]
    """(B, 3, V, V) float32 in [0, 1]: the same crop and flip as image, at the tokeniser's resolution."""
    sample_id: Tensor
    """(B,) int64 identifies the pair."""
    image_id: Tensor
    """(B,) int64 identifies the picture; pairs that share one are never each other's negatives."""
    source: NotRequired[Tensor]
    """(B,) int64 number of the data set in data.sources that the pair is of."""
    itm_draws: Tensor
    """(B, 2) float32 uniform in [0, 1): the wrong image for text b, the wrong text for image b (inverse CDF)."""
    negative_image: NotRequired[Tensor]
    """(B,) int64 a recorded draw: the wrong image for text b. Replaces the draw where present (simla verify)."""
    negative_text: NotRequired[Tensor]
    """(B,) int64 a recorded draw: the wrong text for image b."""


@dataclass
class Features:
    """What one network (student or teacher) makes of a batch before any cross-modal pass."""

    image_tokens: Tensor
    """(B, N, D) the clean picture."""
    masked_image_tokens: Tensor | None
    """(B, N, D) the picture with patch_mask hidden; None when no objective needs it."""
    text_embeddings: Tensor
    """(B, L, D) output of the embedding layer for the unmasked caption; what stands in the padding is of no account."""
    text_tokens: Tensor
    """(B, L, D) the text-only pass, likewise; (B, 1, D), [CLS] alone, where passes are fast and nobody reads more."""
    image_feature: Tensor
    """(B, E) float32 unit vectors."""
    text_feature: Tensor
    """(B, E) float32 unit vectors."""


@dataclass
class ContrastKeys:
    """What ITC compares this rank's rows with: the teacher's features of this batch and of the queue, no gradient."""

    image: Tensor
    """(G, E) float32: of all ranks, rank after rank, when corrected; this rank's, G = B, when official."""
    text: Tensor
    """(G, E)"""
    image_id: Tensor | None
    """(G,) int64: another key of an equal id is neither positive nor negative, or (itc.positives image) right as well;
    None when it counts as wrong: official pretraining."""
    queue_image: Tensor
    """(Q, E) float32, the filled rows of the queue, as views."""
    queue_text: Tensor
    """(Q, E)"""
    queue_id: Tensor | None
    """(Q,) int64; None likewise."""
    first: int
    """Row b's own key is first + b."""
    temperature: Tensor
    """(1,) float32, with gradient."""


@dataclass
class StepFeatures:
    """All that objectives may look at before they ask for passes."""

    student: Features
    teacher: Features
    keys: ContrastKeys


class Read(Enum):
    """What an objective reads of a pass."""

    CLS = "cls"
    """The first row: (R, D)."""
    ROWS = "rows"
    """The rows at Request.rows: (M, D)."""
    ALL = "all"
    """Every row: (R, L or N, D)."""
    CLS_ATTENTION = "cls_attention"
    """The last layer's self-attention of the first row, undropped, float32: (R, H, L)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an objective wants of a cross-modal pass: R rows of text over images, or R images over text."""

    direction: Literal["text_over_image", "image_over_text"]
    by: Literal["student", "teacher"]
    read: Read
    image_tokens: Tensor
    """(S, N, D) the pictures; S = R unless image_index picks among them."""
    image_index: Tensor | None = None
    """(R,) int64 which picture row r sees (text_over_image only); None: row r sees picture r."""
    input_ids: Tensor | None = None
    """(R, L) int64, text_over_image."""
    text_keys: Tensor | None = None
    """(R, L, D) image_over_text: what the cross-attention reads of the caption."""
    text_mask: Tensor
    """(R, L) bool, True at real tokens."""
    token_index: Tensor | None = None
    """(T,) int64 flat positions in (R * L), ascending: the slots worth computing, all real tokens among them. None:
    all slots, where padding is read too or where the number of real tokens is known to the device only."""
    rows: Tensor | None = None
    """(M,) int64 flat positions for Read.ROWS, ascending: in (R * L) for text, in (R * P) for patches ([CLS] not
    counted)."""

    def __post_init__(self):
        if self.direction == "text_over_image" and self.read is Read.ALL and self.token_index is not None:
            raise ValueError("a text_over_image request that reads all slots computes all of them: give no token_index")


@dataclass
class Outputs:
    """Results of an objective's requests, in the order it asked."""

    results: Sequence[Tensor] = field(default_factory=list)

    def __getitem__(self, index: int) -> Tensor:
        return self.results[index]
