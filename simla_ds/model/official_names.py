"""The published implementation's parameter names, and ours."""

from __future__ import annotations

import re

_RULES = [
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
    (r"^temp$", "temperature.value"),
]

ALIASES = (
    "text_encoder.cls.predictions.decoder.weight",
    "text_encoder.cls.predictions.decoder.bias",
    "text_encoder.bert.embeddings.position_ids",
)
"""Saved twice, or no parameter at all."""


def our_name(official: str) -> str:
    """Translate a published student parameter name into this project's."""
    for pattern, replacement in _RULES:
        official = re.sub(pattern, replacement, official)
    return official


def split_teacher(official: str) -> tuple[str, bool]:
    """Return the student's name of a published parameter and whether it is the teacher's (`vision_proj_m.weight`)."""
    first, dot, rest = official.partition(".")
    return (first.removesuffix("_m") + dot + rest, True) if first.endswith("_m") else (official, False)
