"""Colour names: recolouring drawings so that a colour word and a thing word vary apart, and plain backgrounds.

A drawing has one colour in nature or in its artist's eye, so a model could read "red" off the tomato. A drawing
whose dominant colour is known is therefore also offered with its hue turned ("a blue tomato"), where a strict
check of the result's own pixels agrees with the word. Pairs held out for `test_pairing` are turned ones only:
the natural look of a thing is never hidden from training.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from simla_ds.data.scenes.kit import kit, opaque_pixels

TARGETS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.78, 0.84),
    "orange": (28, 0.85, 0.97),
    "yellow": (52, 0.80, 0.98),
    "green": (125, 0.65, 0.68),
    "blue": (217, 0.72, 0.86),
    "purple": (276, 0.60, 0.76),
    "pink": (331, 0.46, 0.97),
}
"""Name: (hue in degrees, saturation, value) that the dominant colour is moved to."""

ACCEPT: dict[str, tuple[float, float, float, float, float]] = {
    "red": (-12, 10, 0.50, 1.0, 0.50),
    "orange": (20, 38, 0.60, 1.0, 0.75),
    "yellow": (46, 62, 0.45, 1.0, 0.80),
    "green": (95, 155, 0.35, 1.0, 0.32),
    "blue": (197, 240, 0.40, 1.0, 0.45),
    "purple": (262, 292, 0.35, 1.0, 0.40),
    "pink": (315, 347, 0.22, 0.70, 0.78),
}
"""Name: (hue from, hue to, saturation from, saturation to, value from) where nobody would argue about the name."""

AGREE = 0.6
"""Share of a recoloured drawing's pixels that must lie in ACCEPT."""

NEIGHBOURS = {frozenset(pair) for pair in (
    ("red", "orange"), ("orange", "yellow"), ("red", "pink"), ("pink", "purple"), ("purple", "blue"),
    ("yellow", "brown"), ("orange", "brown"), ("red", "brown"), ("black", "gray"), ("gray", "white"),
)}  # fmt: skip
"""Names too close to tell two otherwise equal drawings apart by."""

KEEPS_ITS_COLOUR = frozenset({
    "drop_of_blood", "water_drop", "blueberries", "tangerine", "tomato", "lemon", "melon", "taxi", "fire_truck",
    "emergency_light", "ear", "foot", "nose", "mouth", "flame", "globe", "world_map", "ice_cube", "mailbox",
    "stop_sign", "dollar_banknote", "euro_banknote", "bus_stop_sign", "polar_bear", "strawberry", "jack_o_lantern",
})  # fmt: skip
"""Another hue would make these another thing (a green tomato is an apple) or the word odd (blue blood)."""

PLAIN: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((200, 44, 48), (178, 34, 40)),
    "orange": ((245, 146, 50), (238, 132, 34)),
    "yellow": ((250, 218, 84), (246, 208, 60)),
    "green": ((84, 160, 84), (64, 140, 72)),
    "dark green": ((22, 76, 48), (28, 68, 40)),
    "light green": ((176, 222, 160), (190, 230, 176)),
    "teal": ((24, 138, 138), (16, 122, 126)),
    "blue": ((52, 108, 204), (40, 92, 184)),
    "light blue": ((168, 212, 240), (184, 220, 244)),
    "navy blue": ((24, 36, 92), (28, 40, 80)),
    "purple": ((122, 74, 172), (104, 60, 150)),
    "lavender": ((206, 192, 236), (214, 202, 240)),
    "pink": ((246, 172, 196), (240, 156, 184)),
    "brown": ((122, 80, 50), (108, 70, 44)),
    "beige": ((232, 216, 184), (226, 208, 172)),
    "gray": ((140, 144, 148), (126, 130, 134)),
    "white": ((250, 250, 250), (244, 244, 244)),
    "black": ((22, 22, 24), (32, 32, 34)),
}
"""Backgrounds of one colour: the name, and shades that nobody would call by another of these names."""


def _to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue in degrees, saturation and value of (N, 3) uint8 colours."""
    channels = rgb.astype(np.float32) / 255
    value, low = channels.max(1), channels.min(1)
    spread = value - low
    safe = np.where(spread == 0, 1, spread)
    r, g, b = channels.T
    hue = np.where(value == r, (g - b) / safe, np.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    return hue * 60 % 360, spread / np.where(value == 0, 1, value), value


def _to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Invert `_to_hsv`."""
    channels = []
    for offset in (5, 3, 1):
        k = (offset + hue / 60) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.rint(np.stack(channels, 1) * 255).astype(np.uint8)


def share_called(rgb: np.ndarray, colour: str) -> float:
    """Return the share of (N, 3) uint8 colours that are `colour` beyond dispute."""
    hue, saturation, value = _to_hsv(rgb)
    first, last, dull, vivid, dark = ACCEPT[colour]
    in_hue = (hue - first) % 360 <= last - first
    return float((in_hue & (saturation >= dull) & (saturation <= vivid) & (value >= dark)).mean())


@dataclass(frozen=True)
class _Paint:
    """A drawing by hue, saturation and value, with the medians of its dominant hue and the pixels that go with it."""

    pixels: np.ndarray
    hue: np.ndarray
    saturation: np.ndarray
    value: np.ndarray
    dominant: tuple[float, float, float]
    near: np.ndarray


def _angle(hue: np.ndarray, other: float) -> np.ndarray:
    """Return the signed way from `other` to each hue, within 180 degrees."""
    return (hue - other + 180) % 360 - 180


@lru_cache(maxsize=4)  # the colours of one drawing are tried one after the other
def _paint(vendor: str, concept: str) -> _Paint | None:
    pixels = np.asarray(kit().sprite(vendor, concept))
    flat = pixels.reshape(-1, 4)
    hue, saturation, value = _to_hsv(flat[:, :3])
    body = (flat[:, 3] >= 128) & (saturation > 0.25) & (value > 0.2)
    if body.mean() < 0.1:
        return None
    histogram = np.histogram(hue[body], bins=36, range=(0, 360))[0]
    peak = (histogram + np.roll(histogram, 1) + np.roll(histogram, -1)).argmax() * 10.0 + 5
    chosen = body & (np.abs(_angle(hue, peak)) <= 30)
    middle = peak + float(np.median(_angle(hue[chosen], peak)))
    dominant = (middle, float(np.median(saturation[chosen])), float(np.median(value[chosen])))
    near = (np.abs(_angle(hue, peak)) <= 45) & (saturation > 0.12)  # a rose's stem stays green
    return _Paint(pixels, hue, saturation, value, dominant, near)


@cache
def recoloured(vendor: str, concept: str, colour: str) -> Image.Image | None:
    """Return the drawing with its dominant hue turned to `colour`, or None where the result is not clearly that.

    Shading survives: hues turn by one angle; saturation and value are scaled, or moved nearer to full.
    """
    paint = _paint(vendor, concept)
    if paint is None:
        return None
    hue, saturation, value = paint.dominant
    target_hue, target_saturation, target_value = TARGETS[colour]
    vivid = np.clip(paint.saturation * target_saturation / saturation, 0, 1)
    level = paint.value * target_value / value
    lifted = 1 - (1 - paint.value) * (1 - target_value) / max(0.04, 1 - value)
    bright = np.clip(np.where(level > 1, lifted, level), 0, 1)
    moved = _to_rgb((paint.hue + target_hue - hue) % 360, vivid, bright)
    pixels = paint.pixels.copy()
    flat = pixels.reshape(-1, 4)
    flat[paint.near, :3] = moved[paint.near]
    image = Image.fromarray(pixels)
    return image if share_called(opaque_pixels(image), colour) >= AGREE else None


@cache
def colours_to_try(vendor: str, concept: str) -> tuple[str, ...]:
    """Return the colours that this drawing might be turned to and that it has in none of the sets."""
    thing = kit().concepts[concept]
    if thing.colours[vendor] not in (*TARGETS, "brown") or concept in KEEPS_ITS_COLOUR:
        return ()
    return tuple(name for name in TARGETS if name not in thing.colours.values())


def is_held_out_pair(colour: str, concept: str) -> bool:
    """Whether this turned colour of this thing is kept for `test_pairing`: one pair in five, by hash."""
    natural = kit().concepts[concept].colours.values()
    return colour not in natural and zlib.crc32(f"{colour} {concept}".encode()) % 5 == 0


def visible_share(rgb: np.ndarray, background: tuple[int, int, int]) -> float:
    """Return the share of (N, 3) uint8 colours that stand out from a plain background."""
    distance = np.abs(rgb.astype(np.int16) - np.asarray(background, np.int16)).max(1)
    return float((distance > 48).mean())
