"""The report's plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data_efficiency.needed import Curve, pairs_needed
from benchmarks.data_efficiency.rows import Row

AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "pairs": ("distinct pairs", lambda row: row["pairs"]),
    "gflop": ("GFLOP of training, counted", lambda row: row["gflop"]),
    "seconds": ("CPU seconds of the whole training command, its start included", lambda row: row["cpu_seconds"]),
}
"""File name -> what the horizontal axis says and shows."""


def draw_scores(
    rows: Sequence[Row],
    groups: Sequence[str],
    seeds: Mapping[float, Collection[int]],
    measure: str,
    name: str,
    folder: Path,
) -> list[str]:
    """Draw the student's measure against each of AXES, a point per cell and a line through the means over seeds.

    seeds: those that a mean is taken over, by fraction, so that it is of the same seeds for every set. Points at one
    place of an axis are one fraction: what a cell costs depends on its set, hardly on its fraction, so the plots
    against cost show sets side by side. Returns the names of the PNGs written into folder.
    """
    written = []
    for file, (label, value) in AXES.items():
        figure, axis = _figure()
        for number, group in enumerate(groups):
            of = [row for row in rows if row["group"] == group]
            colour = f"C{number}"
            axis.scatter([value(r) for r in of], [_score(r, measure) for r in of], color=colour, s=14, alpha=0.5)
            cells = [[r for r in of if r["fraction"] == share and r["seed"] in seeds[share]] for share in sorted(seeds)]
            means = [
                (_mean([value(r) for r in some]), _mean([_score(r, measure) for r in some])) for some in cells if some
            ]
            axis.plot([x for x, _ in means], [y for _, y in means], color=colour, marker="o", markersize=4, label=group)
        axis.set_xscale("log")
        written.append(_save(figure, axis, label, f"{name}, %", folder / f"score_by_{file}.png"))
    return written


def draw_needed(
    curves: Mapping[str, Mapping[int, Curve]], pairs: Sequence[Sequence[str]], name: str, folder: Path
) -> list[str]:
    """Draw, for each (first, second), how many times the second's pairs the first needs, against the score it is for.

    curves: by group and seed. A thin line per seed that both have, of two at least, and the mean of their logarithms.
    Drawn over the scores that both reach above their smallest fraction in every seed. Returns the names of the PNGs
    written: none while no two curves overlap.
    """
    figure, axis = _figure()
    for number, (first, second) in enumerate(pairs):
        seeds = sorted(curves[first].keys() & curves[second].keys())
        targets = _targets([curves[group][seed] for group in (first, second) for seed in seeds])
        if len(seeds) < 2 or not targets:
            continue
        logs = [[_log_ratio(curves[first][seed], curves[second][seed], t) for t in targets] for seed in seeds]
        for of in logs:
            axis.plot(targets, [math.exp(value) for value in of], color=f"C{number}", linewidth=0.6, alpha=0.6)
        means = [math.exp(_mean(values)) for values in zip(*logs, strict=True)]
        axis.plot(targets, means, color=f"C{number}", label=f"{first} / {second}")
    if not axis.lines:
        return []
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    return [_save(figure, axis, f"{name}, %", "pairs needed, ratio", folder / "pairs_needed.png")]


def _targets(curves: Sequence[Curve]) -> list[float]:
    """Return scores that all curves reach above their smallest fraction."""
    scores = [[score for _, score in curve] for curve in curves]
    low, high = max(map(min, scores), default=0.0), min(map(max, scores), default=0.0)
    return [min(high, low + (high - low) * step / 50) for step in range(51)] if high > low else []


def _log_ratio(first: Curve, second: Curve, target: float) -> float:
    mine, theirs = pairs_needed(first, target), pairs_needed(second, target)
    assert mine is not None, f"{target} lies within {first}"
    assert theirs is not None, f"{target} lies within {second}"
    return math.log(mine / theirs)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, axis: Any, across: str, up: str, file: Path) -> str:
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)
    return file.name


def _score(row: Row, measure: str) -> float:
    return row["metrics"]["student"][measure]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
