"""The objective sets that a grid compares, as changes to its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]
"""Nested keys, as a recipe holds them."""


def _without(*objectives: str) -> Settings:
    return {"objectives": {name: {"weight": 0.0} for name in objectives}}


SETS: dict[str, tuple[str, Settings]] = {
    "itc": ("dual stream, contrast alone (as CLIP)", _without("itm", "mlm", "xmm", "psl")),
    "albef": (
        "half the layers read text, half fuse (ALBEF's stack and losses)",
        _without("xmm", "psl") | {"model": {"stream": {"shared": False, "token_types": True}}},
    ),
    "itc+itm+mlm": ("ALBEF's losses in SIMLA's stack", _without("xmm", "psl")),
    "itc+itm+mlm+xmm": ("the same with cross-modal reconstruction", _without("psl")),
    "itc+itm+mlm+psl": ("the same with pseudo-labelled keywords", _without("xmm")),
    "simla": ("all five objectives", {}),
}
"""Name -> what it is, and what it changes. ALBEF's depths are the grid's model.stream.text_layers and fusion_layers."""


def merged(*layers: Mapping[str, Any]) -> Settings:
    """Return nested settings in which later layers win."""
    result: Settings = {}
    for layer in layers:
        for key, value in layer.items():
            inner = result.get(key)
            result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result
