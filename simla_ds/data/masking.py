"""What is hidden from the masked passes: blocks of patches for XMM, single tokens for MLM."""

from __future__ import annotations

import math

import numpy as np

_TRIES = 10
_MIN_BLOCK = 16 / 256
"""Smallest aimed-at block as a share of the patches: 16 of 256 in the published code."""
_LOG_ASPECT = math.log(1 / 0.3)


def block_mask(grid: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide round(ratio * P) patches, or a few less, as rectangles (BEiT's block masking, scaled to the grid).

    grid: patches along one side, P = grid**2, at least 2. Returns (P,) bool, True at hidden patches; never all, never
    none. At grid 16 and ratio 75/256 it is the published generator (64 to 75 hidden, 74.3 on average).
    """
    if grid < 2:
        raise ValueError(f"a picture of {grid}x{grid} patches cannot be masked in part; lower model.vision.patch_size")
    patches = grid * grid
    target = min(max(round(ratio * patches), 1), patches - 1)
    smallest = min(_MIN_BLOCK * patches, target)
    mask = np.zeros((grid, grid), dtype=bool)
    hidden = 0
    while hidden < target:
        added = _add_block(mask, smallest, target - hidden, rng)
        if not added:
            break
        hidden += added
    if not hidden:
        mask.flat[int(rng.integers(patches))] = True
    return mask.reshape(-1)


def _add_block(mask: np.ndarray, smallest: float, room: int, rng: np.random.Generator) -> int:
    """Hide one more rectangle that adds 1 to room patches; return how many it added, 0 when no try fits."""
    grid = mask.shape[0]
    for area_draw, aspect_draw, top_draw, left_draw in rng.random((_TRIES, 4)).tolist():
        area = smallest + (room - smallest) * area_draw  # also where room < smallest, as published
        aspect = math.exp(_LOG_ASPECT * (2 * aspect_draw - 1))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = int(top_draw * (grid - height + 1)), int(left_draw * (grid - width + 1))
        block = mask[top : top + height, left : left + width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= room:
            block[...] = True
            return added
    return 0


def mask_tokens(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    special: tuple[int, ...],
    mask_id: int,
    vocabulary_size: int,
    probability: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens for MLM and hide them: 80% become [MASK], 10% a random word, 10% stay (BERT).

    ids: (L,) int64. special: ids that are never chosen and never put in at random.
    Returns the changed ids (L,) int64 and the chosen positions (L,) bool; at least one where there is any word.
    """
    eligible = (ids[:, None] != np.array(special)).all(axis=1)
    draws = rng.random((3, len(ids)))
    chosen = eligible & (draws[0] < probability)
    if not chosen.any() and eligible.any():
        chosen[np.where(eligible, draws[0], 2.0).argmin()] = True
    words = (draws[2] * (vocabulary_size - len(set(special)))).astype(np.int64)
    for skipped in sorted(set(special)):  # number of an ordinary word -> its id
        words += words >= skipped
    changed = np.where(chosen & (draws[1] < 0.8), mask_id, ids)
    return np.where(chosen & (draws[1] >= 0.9), words, changed), chosen
