"""What the numbers of several seeds say: means, paired differences, and what could have been seen at all.

Seeds share start weights and the order of the data between sets, so differences are paired by seed. Three seeds say
little of how much one difference varies, so this is estimated from all sets of a fraction together: a randomised
complete block design, with sets as treatments and seeds as blocks (Fisher 1935, The Design of Experiments, chapter 4).
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
    freedom: int
    """Degrees of freedom of the error."""

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.error:.1f}" if self.error is not None else "")

    @property
    def interval(self) -> tuple[float, float] | None:
        """At CONFIDENCE, Student's t over seeds; None for one seed."""
        if self.error is None:
            return None
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def p_value(self) -> float:
        """Two-sided, that the mean is 0; 1 where one seed or numbers that are not finite can tell nothing."""
        if self.error is None or not math.isfinite(self.error):
            return 1.0
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))


@dataclass(frozen=True)
class Comparison:
    """The paired difference first - second, in the measure's own unit."""

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: Estimate
    alone: Estimate
    """The same with the error of these two groups alone: the paired t-test."""

    def __str__(self) -> str:
        said, interval = f"{self.first} against {self.second}: {self.difference.mean:+.1f}", self.difference.interval
        if interval is None:
            return f"{said} in one seed, without an interval"
        said = f"{said} ({CONFIDENCE:.0%} interval {interval[0]:+.1f} to {interval[1]:+.1f}"
        if (own := self.alone.interval) is not None and self.alone.freedom < self.difference.freedom:
            said += f", by these two alone {own[0]:+.1f} to {own[1]:+.1f}"
        return f"{said}, {len(self.seeds)} seeds)"


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
    return Estimate(float(numbers.mean()), error, len(numbers), len(numbers) - 1)


def compare(first: str, second: str, block: Mapping[str, Mapping[int, float]]) -> Comparison | None:
    """Return the difference over the seeds that both have; None where they share none.

    Args:
        block: a measure of each group by seed, all at one fraction. What seed and group do not explain is taken to
            vary equally in every group that has all those seeds; of two groups alone this is the paired t-test.
    """
    seeds = tuple(sorted(block[first].keys() & block[second].keys()))
    if not seeds:
        return None
    lines = {name: [of[seed] for seed in seeds] for name, of in block.items() if of.keys() >= set(seeds)}
    table = np.array([line for name, line in lines.items() if name in (first, second) or np.isfinite(line).all()])
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (len(table) - 1) * (len(seeds) - 1)
    error = math.sqrt(2 * float((rest**2).sum()) / freedom / len(seeds)) if freedom else None
    difference = float(np.mean(lines[first]) - np.mean(lines[second]))
    alone = estimate({seed: block[first][seed] - block[second][seed] for seed in seeds})
    assert alone is not None
    return Comparison(first, second, seeds, Estimate(difference, error, len(seeds), freedom), alone)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return a family's p-values, adjusted so that the chance of any false verdict is that of one (Holm 1979)."""
    adjusted, least = [1.0] * len(p_values), 0.0
    for place, number in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = least
    return adjusted


def detectable(error: float, freedom: int, comparisons: int) -> float:
    """Return the smallest true difference that would be shown to be significant with POWER.

    Args:
        error: standard error of a difference, with its degrees of freedom.
        comparisons: tests that share the error (Bonferroni, which is Holm's first step); 1: one alone.

    The power is that of the t test, by the noncentral t distribution.
    """
    bound = float(stats.t.isf((1 - CONFIDENCE) / 2 / comparisons, freedom))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(bound, freedom, shift)) - POWER

    shift: Any = optimize.brentq(lacking, 0.0, 10.0 * bound)
    return error * float(shift)
