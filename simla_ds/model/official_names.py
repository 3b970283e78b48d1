"""The published implementation's parameter names, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

_RULES = [
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),  # the oldest BERT files, bert-base-uncased among them
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^text_encoder\.(embeddings|encoder)\.", r"text_encoder.bert.\1."),  # as downstream models spell it
    (r"^visual_encoder\.", "image_encoder."),
    (r"^text_encoder\.cls\.predictions\.transform\.dense\.", "language_head.transform."),
    (r"^text_encoder\.cls\.predictions\.transform\.LayerNorm\.", "language_head.norm."),
    (r"^text_encoder\.cls\.predictions\.bias$", "language_head.decoder.bias"),
    (r"^text_encoder\.bert\.embeddings\.word_embeddings\.", "stream.embeddings.word."),
    (r"^text_encoder\.bert\.embeddings\.position_embeddings\.", "stream.embeddings.position."),
    (r"^text_encoder\.bert\.embeddings\.token_type_embeddings\.", "stream.embeddings.token_type."),
    (r"^text_encoder\.bert\.embeddings\.LayerNorm\.", "stream.embeddings.norm."),
    (r"^text_encoder\.bert\.encoder\.layer\.(\d+)\.attention\.", r"stream.layers.\1.self_attention."),
    (r"^text_encoder\.bert\.encoder\.layer\.(\d+)\.crossattention\.", r"stream.layers.\1.cross_attention."),
    (r"^text_encoder\.bert\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"stream.layers.\1.feed_forward.up."),
    (r"^text_encoder\.bert\.encoder\.layer\.(\d+)\.output\.dense\.", r"stream.layers.\1.feed_forward.down."),
    (r"^text_encoder\.bert\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"stream.layers.\1.feed_forward.norm."),
    (r"attention\.self\.", "attention."),
    (r"attention\.output\.dense\.", "attention.output."),
    (r"attention\.output\.LayerNorm\.", "attention.norm."),
    (r"^vision_proj\.", "image_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^mim_head\.", "visual_head."),
    (r"^itm_head\.", "match_head."),
    (r"^cls_head\.", "head."),
    (r"^temp$", "temperature.value"),
]

ALIASES = (
    "text_encoder.cls.predictions.decoder.weight",
    "text_encoder.cls.predictions.decoder.bias",
    "text_encoder.bert.embeddings.position_ids",
    "text_encoder.embeddings.position_ids",
    "text_decoder.cls.predictions.decoder.weight",
    "text_decoder.cls.predictions.decoder.bias",
    "text_decoder.bert.embeddings.position_ids",
)
"""Saved twice, or no parameter at all."""

BUFFERS = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
"""The feature queue: no parameters of the network."""


@dataclass
class PublishedState:
    """A published state dict, sorted. Aliases and buffers are in none of its parts."""

    student: dict[str, Tensor] = field(default_factory=dict)
    """By this project's names; the scalar temperature as (1,)."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """The momentum copies (`_m`), by the student's names."""


def our_name(official: str) -> str:
    """Translate a published student parameter name into this project's."""
    if official.startswith("text_decoder."):  # VQA's: named like a pretraining model's text encoder
        return re.sub(r"^stream\.", "decoder.", our_name(official.replace("text_decoder.", "text_encoder.", 1)))
    for pattern, replacement in _RULES:
        official = re.sub(pattern, replacement, official)
    return official


def split_teacher(official: str) -> tuple[str, bool]:
    """Return the student's name of a published parameter and whether it is the teacher's (`vision_proj_m.weight`)."""
    first, dot, rest = official.partition(".")
    return (first.removesuffix("_m") + dot + rest, True) if first.endswith("_m") else (official, False)


def translate(weights: Mapping[str, Tensor]) -> PublishedState:
    """Sort published parameters into student and teacher and give them this project's names.

    The tied decoder is one parameter, `stream.embeddings.word.weight`. Unknown names are kept as they are.
    Raises ValueError when a parameter is there under two spellings.
    """
    state = PublishedState()
    for name, value in weights.items():
        student_name, is_teacher = split_teacher(name)
        if student_name in ALIASES or name in BUFFERS:
            continue
        part = state.teacher if is_teacher else state.student
        ours = our_name(student_name)
        if ours in part:
            raise ValueError(f"{name} is there twice, under two spellings; both mean {ours}")
        part[ours] = value.reshape(1) if value.dim() == 0 else value
    return state
