"""Which rows may be compared, and what the numbers of several seeds say: means, paired differences, what could have
been seen at all.

Seeds share start weights and the order of the data between sets, so differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from benchmarks.data_efficiency.rows import DONE, Row

CONFIDENCE = 0.95
POWER = 0.8
"""Chance of finding a difference of Comparison.detectable."""


def comparable(rows: Sequence[Row], grid_hash: str, code: str = "") -> tuple[list[Row], list[str]]:
    """Return the rows that may be compared with each other, and a line for every group that is left out.

    Comparable are rows of one code, one shared configuration and the same data. Of several rows of one cell, whose own
    changes to the configuration were edited, the newest counts.

    Args:
        grid_hash: shared configuration to take (Grid.shared_hash).
        code: code hash to take; empty: the one with most finished rows.

    Raises ValueError when there is no such row.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["grid_hash"], row["code_hash"], row["data_hash"]), []).append(row)
    fitting = {key: rows for key, rows in groups.items() if key[0] == grid_hash and code in ("", key[1])}
    if not fitting:
        there = ", ".join(f"{shared} (code {of})" for shared, of, _ in groups) or "none at all"
        raise ValueError(
            f"no rows of configuration {grid_hash}{code and f' and code {code}'}; there are rows of {there}"
        )
    chosen = max(fitting, key=lambda key: sum(row["status"] == DONE for row in fitting[key]))
    remarks = [
        f"{len(others)} row(s) of configuration {key[0]}, code {key[1]}, data {key[2]} left out"
        for key, others in groups.items()
        if key != chosen
    ]
    newest: dict[str, Row] = {}
    for row in sorted(groups[chosen], key=lambda row: row["date"]):
        if row["cell"] in newest:
            remarks.append(f"{row['cell']}: an older row ({newest[row['cell']]['config_hash']}) left out")
        newest[row["cell"]] = row
    return list(newest.values()), remarks


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float | None
    """Standard error of the mean; None for one seed."""
    count: int
    """Seeds."""

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.error:.1f}" if self.error is not None else "")


@dataclass(frozen=True)
class Comparison:
    """The paired difference first - second, in the measure's own unit."""

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float] | None
    """At CONFIDENCE, Student's t over seeds; None for one seed."""
    detectable: float | None
    """Smallest true difference that these seeds would have shown to be significant with POWER."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0. Not corrected for the number of comparisons."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        said = f"{self.first} against {self.second}: {self.difference:+.1f}"
        if self.interval is None or self.detectable is None:
            return f"{said} in one seed: no interval, so nothing can be said of significance"
        low, high = self.interval
        verdict = "significant" if self.significant else "not significant"
        return (
            f"{said} ({CONFIDENCE:.0%} interval {low:+.1f} to {high:+.1f}, {len(self.seeds)} seeds, "
            f"detectable {self.detectable:.1f}): {verdict}"
        )


def by_seed(rows: Sequence[Row], group: str, fraction: float, measure: str, who: str) -> dict[int, float]:
    """Return a measure of the finished cells of a group at a fraction, by seed."""
    return {
        row["seed"]: row["metrics"][who][measure]
        for row in rows
        if row["status"] == DONE
        and (row["group"], row["fraction"]) == (group, fraction)
        and measure in row["metrics"][who]
    }


def estimate(values: Mapping[int, float]) -> Estimate | None:
    """Return mean and standard error over seeds; None without any."""
    if not values:
        return None
    numbers = np.array(list(values.values()))
    error = float(stats.sem(numbers)) if len(numbers) > 1 else None
    return Estimate(float(numbers.mean()), error, len(numbers))


def compare(
    first: str, second: str, of_first: Mapping[int, float], of_second: Mapping[int, float]
) -> Comparison | None:
    """Return the difference over the seeds that both have; None where they share none."""
    seeds = tuple(sorted(of_first.keys() & of_second.keys()))
    if not seeds:
        return None
    differences = np.array([of_first[seed] - of_second[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1:
        return Comparison(first, second, seeds, mean, None, None)
    error, freedom = float(stats.sem(differences)), len(seeds) - 1
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    detectable = (reach + float(stats.t.ppf(POWER, freedom))) * error
    return Comparison(first, second, seeds, mean, (mean - reach * error, mean + reach * error), detectable)


def pairs_needed(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return how many pairs give a score, read off between measured points on a logarithmic axis of pairs.

    curve: (pairs, mean score), any order. None when no measured point reaches the target; the smallest number measured
    when already that does (it may need fewer).
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
