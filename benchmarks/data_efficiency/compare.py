"""What the numbers of several seeds say: means, paired differences, and what could have been seen at all.

Seeds share start weights and the order of the data between sets, so differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from benchmarks.data_efficiency.rows import DONE, Row

CONFIDENCE = 0.95
POWER = 0.8
"""Chance of finding a difference of `detectable`."""


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

    @property
    def interval(self) -> tuple[float, float] | None:
        """At CONFIDENCE, Student's t over seeds; None for one seed."""
        if self.error is None:
            return None
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1)) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def p_value(self) -> float:
        """Two-sided, that the mean is 0; 1 where one seed or numbers that are not finite can tell nothing."""
        if self.error is None or not math.isfinite(self.error):
            return 1.0
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.count - 1))


@dataclass(frozen=True)
class Comparison:
    """The paired difference first - second, in the measure's own unit."""

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: Estimate

    def __str__(self) -> str:
        said, interval = f"{self.first} against {self.second}: {self.difference.mean:+.1f}", self.difference.interval
        if interval is None:
            return f"{said} in one seed, without an interval"
        return f"{said} ({CONFIDENCE:.0%} interval {interval[0]:+.1f} to {interval[1]:+.1f}, {len(self.seeds)} seeds)"

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the difference over seeds; None for one seed."""
        return None if self.difference.error is None else self.difference.error * math.sqrt(len(self.seeds))


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
    found = estimate({seed: of_first[seed] - of_second[seed] for seed in seeds})
    return None if found is None else Comparison(first, second, seeds, found)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return a family's p-values, adjusted so that the chance of any false verdict is that of one (Holm 1979)."""
    adjusted, least = [1.0] * len(p_values), 0.0
    for place, number in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = least
    return adjusted


def detectable(deviations: Sequence[tuple[float, int]], seeds: int, comparisons: int) -> float:
    """Return the smallest true difference that so many seeds would show to be significant with POWER.

    Args:
        deviations: (standard deviation of a paired difference, its seeds), pooled: one alone, of three seeds, says
            little.
        seeds: those of the planned test, at least two.
        comparisons: tests that share the error (Bonferroni, which is Holm's first step); 1: one alone.

    The power is that of the t test, by the noncentral t distribution.
    """
    weight = sum(count - 1 for _, count in deviations)
    pooled = math.sqrt(sum((count - 1) * deviation**2 for deviation, count in deviations) / weight)
    bound = float(stats.t.isf((1 - CONFIDENCE) / 2 / comparisons, seeds - 1))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(bound, seeds - 1, shift)) - POWER

    shift: Any = optimize.brentq(lacking, 0.0, 10.0 * bound)
    return pooled / math.sqrt(seeds) * float(shift)
