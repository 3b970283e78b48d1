"""Spatial words and when they are true. Each needs a clear margin: what is not clear is not said, nor denied.

All functions take boxes (x, y, width, height) in pixels and the picture's side `size`. Directions are the viewer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

from simla_ds.data.scenes.layout import Box

APART = 0.18
"""Centres must differ by this share of the picture's side before one is left of, or above, the other."""
ALONGSIDE = 0.12
"""Widest gap between two boxes, as a share of the side, that is still "next to"."""

PLACES = ("left", "right", "top", "bottom", "middle", "top left", "top right", "bottom left", "bottom right")


def centre(box: Box) -> tuple[float, float]:
    """Return the middle point."""
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def _before(a: Box, b: Box, axis: int, size: int) -> bool:
    """Whether a lies before b along the axis, clearly and mainly along it."""
    ahead = centre(b)[axis] - centre(a)[axis]
    aside = abs(centre(b)[1 - axis] - centre(a)[1 - axis])
    shared = a[axis] + a[axis + 2] - b[axis]
    return ahead >= APART * size and ahead > 1.2 * aside and shared <= 0.2 * min(a[axis + 2], b[axis + 2])


def left_of(a: Box, b: Box, size: int) -> bool:
    """Whether a is to the left of b."""
    return _before(a, b, 0, size)


def above(a: Box, b: Box, size: int) -> bool:
    """Whether a is above b."""
    return _before(a, b, 1, size)


def next_to(a: Box, b: Box, size: int) -> bool:
    """Whether a and b stand side by side with little room between."""
    if not (left_of(a, b, size) or left_of(b, a, size)):
        return False
    gap = max(a[0], b[0]) - min(a[0] + a[2], b[0] + b[2])
    level = abs(centre(a)[1] - centre(b)[1]) <= 0.4 * min(a[3], b[3])
    return level and gap <= ALONGSIDE * size


def between(middle: Box, a: Box, b: Box, size: int) -> bool:
    """Whether `middle` is between a and b, in a row or in a column."""
    for axis in (0, 1):
        first, last = (a, b) if centre(a)[axis] <= centre(b)[axis] else (b, a)
        if not (_before(first, middle, axis, size) and _before(middle, last, axis, size)):
            continue
        low, high = sorted((centre(a)[1 - axis], centre(b)[1 - axis]))
        if low - 0.12 * size <= centre(middle)[1 - axis] <= high + 0.12 * size and high - low <= 0.3 * size:
            return True
    return False


def places(box: Box, size: int) -> tuple[str, ...]:
    """Return every word of PLACES that is true of the box, the most telling first."""
    x, y = (value / size for value in centre(box))
    across = "left" if x <= 0.37 else "right" if x >= 0.63 else ""
    down = "top" if y <= 0.37 else "bottom" if y >= 0.63 else ""
    if abs(x - 0.5) <= 0.09 and abs(y - 0.5) <= 0.09:
        return ("middle",)
    corner = (f"{down} {across}",) if across and down else ()
    return corner + tuple(word for word in (across, down) if word)


def relations(boxes: Sequence[Box], size: int) -> list[list]:
    """Return all true ["left of", i, j], ["above", i, j], ["next to", i, j] and ["between", m, i, j].

    The last two have i < j, since turned round they say the same.
    """
    found: list[list] = []
    for i, j in permutations(range(len(boxes)), 2):
        found += [["left of", i, j]] * left_of(boxes[i], boxes[j], size)
        found += [["above", i, j]] * above(boxes[i], boxes[j], size)
        found += [["next to", i, j]] * (i < j and next_to(boxes[i], boxes[j], size))
    for i, j in combinations(range(len(boxes)), 2):
        for m in range(len(boxes)):
            if m not in (i, j) and between(boxes[m], boxes[i], boxes[j], size):
                found.append(["between", m, i, j])
    return found
