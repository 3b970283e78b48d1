"""The report's plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.data_efficiency.rows import Row

AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "pairs": ("distinct pairs", lambda row: row["pairs"]),
    "gflop": ("GFLOP of training, counted", lambda row: row["gflop"]),
    "seconds": ("CPU seconds of training", lambda row: row["cpu_seconds"]),
}
"""File name -> what the horizontal axis says and shows."""


def draw(rows: Sequence[Row], groups: Sequence[str], measure: str, name: str, folder: Path) -> list[str]:
    """Draw the student's measure against each of AXES, a point per cell and a line through the means over seeds.

    Points at one place of an axis are one fraction: what a cell costs depends on its set, hardly on its fraction, so
    the plots against cost show sets side by side. Returns the names of the PNGs written into folder.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for file, (label, value) in AXES.items():
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for number, group in enumerate(groups):
            of = [row for row in rows if row["group"] == group]
            colour = f"C{number}"
            axis.scatter([value(r) for r in of], [_score(r, measure) for r in of], color=colour, s=14, alpha=0.5)
            fractions = sorted({row["fraction"] for row in of})
            cells = [[row for row in of if row["fraction"] == fraction] for fraction in fractions]
            means = [(_mean([value(r) for r in some]), _mean([_score(r, measure) for r in some])) for some in cells]
            axis.plot([x for x, _ in means], [y for _, y in means], color=colour, marker="o", markersize=4, label=group)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(f"{name}, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        written.append(f"score_by_{file}.png")
        figure.savefig(folder / written[-1], dpi=100)
        plt.close(figure)
    return written


def _score(row: Row, measure: str) -> float:
    return row["metrics"]["student"][measure]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
