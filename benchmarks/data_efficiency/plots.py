"""The report's plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data_efficiency.compare import pairs_needed
from benchmarks.data_efficiency.rows import Row

AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "pairs": ("distinct pairs", lambda row: row["pairs"]),
    "gflop": ("GFLOP of training, counted", lambda row: row["gflop"]),
    "seconds": ("CPU seconds of training", lambda row: row["cpu_seconds"]),
}
"""File name -> what the horizontal axis says and shows."""


def draw_scores(rows: Sequence[Row], groups: Sequence[str], measure: str, name: str, folder: Path) -> list[str]:
    """Draw the student's measure against each of AXES, a point per cell and a line through the means over seeds.

    Points at one place of an axis are one fraction: what a cell costs depends on its set, hardly on its fraction, so
    the plots against cost show sets side by side. Returns the names of the PNGs written into folder.
    """
    written = []
    for file, (label, value) in AXES.items():
        figure, axis = _figure()
        for number, group in enumerate(groups):
            of = [row for row in rows if row["group"] == group]
            colour = f"C{number}"
            axis.scatter([value(r) for r in of], [_score(r, measure) for r in of], color=colour, s=14, alpha=0.5)
            fractions = sorted({row["fraction"] for row in of})
            cells = [[row for row in of if row["fraction"] == fraction] for fraction in fractions]
            means = [(_mean([value(r) for r in some]), _mean([_score(r, measure) for r in some])) for some in cells]
            axis.plot([x for x, _ in means], [y for _, y in means], color=colour, marker="o", markersize=4, label=group)
        axis.set_xscale("log")
        written.append(_save(figure, axis, label, f"{name}, %", folder / f"score_by_{file}.png"))
    return written


def draw_needed(
    curves: Mapping[str, Sequence[tuple[int, float]]], pairs: Sequence[Sequence[str]], name: str, folder: Path
) -> list[str]:
    """Draw, for each (first, second), how many times the second's pairs the first needs, against the score it is for.

    curves: (pairs, mean score) by group. Drawn over the scores that both reach above their smallest fraction. Returns
    the names of the PNGs written: none while no two curves overlap.
    """
    figure, axis = _figure()
    for first, second in pairs:
        ratios = []
        if min(len(curves[first]), len(curves[second])) > 1:
            scores = [[score for _, score in curves[group]] for group in (first, second)]
            low, high = max(min(of) for of in scores), min(max(of) for of in scores)
            targets = [min(high, low + (high - low) * step / 50) for step in range(51)] if high > low else []
            ratios = [(t, _needed(curves[first], t) / _needed(curves[second], t)) for t in targets]
        if ratios:
            axis.plot([t for t, _ in ratios], [r for _, r in ratios], label=f"{first} / {second}")
    if not axis.lines:
        return []
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    return [_save(figure, axis, f"{name}, %", "pairs needed, ratio", folder / "pairs_needed.png")]


def _needed(curve: Sequence[tuple[int, float]], target: float) -> float:
    found = pairs_needed(curve, target)
    assert found is not None, f"{target} lies within {curve}"
    return found


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
