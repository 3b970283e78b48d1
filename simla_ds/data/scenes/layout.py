"""Where things stand: boxes of 2-4 drawings that hardly overlap, some of them lined up.

A box is (x, y, width, height) in whole pixels. Lined-up layouts are there for the words "between", "above" and
"next to", which boxes strewn at random seldom earn.
"""

from __future__ import annotations

from random import Random

Box = tuple[int, int, int, int]

SIDES: dict[str, tuple[float, float]] = {"small": (0.270, 0.305), "medium": (0.34, 0.41), "large": (0.435, 0.475)}
"""Longest side over the picture's side. The gaps leave no doubt which of two sizes is the larger one."""

MAX_IOU = 0.08
MAX_COVERED = 0.12
"""Share of the smaller of two boxes that the other may cover."""

SLOTS: dict[str, tuple[tuple[float, float], ...]] = {
    "row 2": ((0.26, 0.5), (0.74, 0.5)),
    "column 2": ((0.5, 0.26), (0.5, 0.74)),
    "row 3": ((0.17, 0.5), (0.5, 0.5), (0.83, 0.5)),
    "column 3": ((0.5, 0.17), (0.5, 0.5), (0.5, 0.83)),
    "triangle 3": ((0.25, 0.27), (0.75, 0.27), (0.5, 0.75)),
    "peak 3": ((0.5, 0.25), (0.25, 0.74), (0.75, 0.74)),
    "square 4": ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
}
LINED_UP = 0.45
"""Share of scenes that use slots; the others are strewn."""


def overlap(a: Box, b: Box) -> int:
    """Return the area that two boxes share."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def iou(a: Box, b: Box) -> float:
    """Return intersection over union."""
    shared = overlap(a, b)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def _clear(box: Box, others: list[Box]) -> bool:
    for other in others:
        shared = overlap(box, other)
        if shared and (iou(box, other) > MAX_IOU or shared > MAX_COVERED * min(box[2] * box[3], other[2] * other[3])):
            return False
    return True


def place(shapes: list[tuple[int, int]], size: int, random: Random) -> list[Box] | None:
    """Return a box for each (width, height), all inside a square picture; None where they did not fit."""
    margin = max(1, size // 64)
    slots: list[tuple[float, float]] | None = None
    names = [name for name in SLOTS if name.endswith(str(len(shapes)))]
    if random.random() < LINED_UP:
        slots = list(SLOTS[random.choice(names)])
        random.shuffle(slots)
    boxes: list[Box] = []
    for index, (width, height) in enumerate(shapes):
        for _ in range(30):
            free_x, free_y = size - width - margin, size - height - margin
            if slots is None:
                x, y = random.randint(margin, free_x), random.randint(margin, free_y)
            else:
                jitter = (random.uniform(-0.06, 0.06), random.uniform(-0.06, 0.06))
                x = round((slots[index][0] + jitter[0]) * size - width / 2)
                y = round((slots[index][1] + jitter[1]) * size - height / 2)
                x, y = min(max(x, margin), free_x), min(max(y, margin), free_y)
            box = (x, y, width, height)
            if _clear(box, boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes
