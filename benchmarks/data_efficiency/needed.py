"""How many pairs a set needs for a score, and how many times those of another set that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.data_efficiency.compare import CONFIDENCE, estimate

Curve = Sequence[tuple[int, float]]
"""(pairs, score) of one seed, any order."""


def pairs_needed(curve: Curve, target: float) -> float | None:
    """Return how many pairs give a score, read off between measured points on a logarithmic axis of pairs.

    None when no measured point reaches the target; the smallest number measured when already that does (it may need
    fewer).
    """
    points = sorted(curve)
    if not points or max(score for _, score in points) < target:
        return None
    if points[0][1] >= target:
        return float(points[0][0])
    for (below, low), (above, high) in pairwise(points):
        if high >= target:
            share = (target - low) / (high - low)
            return math.exp(math.log(below) + share * (math.log(above) - math.log(below)))
    return None


def share_needed(mine: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> str:
    """Say what share of all pairs one set needs for the score that another has with all, seed by seed.

    The mean of the ratio's logarithm, with an interval at CONFIDENCE (Student's t over seeds). One seed says nothing.
    """
    found: dict[int, float | None] = {}
    for seed in mine.keys() & theirs.keys():
        pairs, score = max(theirs[seed])
        count = pairs_needed(mine[seed], score)
        found[seed] = None if count is None else math.log(count / pairs)
    reached = {seed: value for seed, value in found.items() if value is not None}
    if len(found) < 2:
        return "-"
    if len(reached) < len(found):
        return f"not reached in {len(found) - len(reached)} of {len(found)} seeds"
    mean = estimate(reached)
    assert mean is not None
    assert mean.interval is not None
    low, high = (math.exp(value) for value in mean.interval)
    return f"{math.exp(mean.mean):.2f} ({CONFIDENCE:.0%} {low:.2f} to {high:.2f}, {mean.count} seeds)"
