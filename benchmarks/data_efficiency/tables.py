"""The report's tables."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.data_efficiency.headlines import PRIMARY
from benchmarks.data_efficiency.needed import share_needed
from benchmarks.data_efficiency.report import Report, spread
from benchmarks.data_efficiency.rows import Row
from simla_ds.objectives import OBJECTIVES

COSTS: dict[str, Callable[[Row], float]] = {
    "pairs seen": lambda row: row["pairs_seen"],
    "GFLOP, counted": lambda row: row["gflop"],
    "seconds, training command": lambda row: row["seconds"],
    "CPU seconds, training command": lambda row: row["cpu_seconds"],
    "CPU seconds, measuring": lambda row: row["measure_cpu_seconds"],
}


@dataclass(frozen=True)
class Table:
    """A table of texts, for Markdown and for HTML."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return Markdown."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def page(self) -> str:
        """Return HTML."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in self.rows)
        return f"<h2>{html.escape(self.title)}</h2>\n<table><tr>{head}</tr>\n{body}</table>"


def tables(report: Report) -> list[Table]:
    """Return every table that has rows."""
    shown = [group for group in report.groups if any(row["group"] == group for row in report.done)]
    found = [
        _by_fraction(report, shown),
        _measures(report, shown, "student", ""),
        _measures(report, shown, "teacher", ""),
    ]
    found += [_measures(report, shown, "student", split) for split in report.grid.measure.splits[1:]]
    found += [_needed(report), _cost(report, shown), _shares(report, shown)]
    return [table for table in found if table.rows]


def _by_fraction(report: Report, shown: Sequence[str]) -> Table:
    name = report.headlines[PRIMARY].name
    rows = [[group, *(report.at(group, fraction, PRIMARY) for fraction in report.fractions)] for group in shown]
    title = f"{name} on {report.split} by fraction of the pairs, %"
    return Table(title, ["student", *(f"{fraction:.0%}" for fraction in report.fractions)], rows)


def _measures(report: Report, shown: Sequence[str], who: str, split: str) -> Table:
    """Every headline with all pairs; split: empty for the first, which has what chance and the oracle get below."""
    last, split = report.fractions[-1], split or report.split
    rows = [[group, *(report.at(group, last, name, who, split) for name in report.headlines)] for group in shown]
    references = {"chance": lambda one: one.chance or "50", "oracle, fitted to the test": lambda one: one.oracle}
    for name, measure in references.items():
        rows.append([name, *(_reference(report, split, measure(one)) for one in report.headlines.values())])
    return Table(f"{split} at {last:.0%}, {who}, %", [who, *(one.name for one in report.headlines.values())], rows)


def _reference(report: Report, split: str, measure: str) -> str:
    if measure == "50":
        return measure
    return spread({row["metrics"]["student"].get(f"{split}/{measure}") for row in report.done} - {None})


def _needed(report: Report) -> Table:
    curves = {group: found for group in report.groups if (found := report.curves(group))}
    rows = [
        [group, *("1" if group == other else share_needed(curves[group], curves[other]) for other in curves)]
        for group in curves
        if any(len(curves[group].keys() & curves[other].keys()) > 1 for other in curves.keys() - {group})
    ]
    title = (
        f"Share of all pairs needed for another set's score with all of them ({report.headlines[PRIMARY].name}; read "
        "off between fractions, seed by seed)"
    )
    return Table(title, ["needed by", *curves], rows)


def _cost(report: Report, shown: Sequence[str]) -> Table:
    last, rows = report.fractions[-1], []
    for group in shown:
        of = report.rows(group, last)
        rows.append([group, *(_mean_and_range(report, group, [get(row) for row in of]) for get in COSTS.values())])
    title = f"Cost of a cell at {last:.0%}, mean and range; times include the start of every process"
    return Table(title, ["set", *COSTS], rows)


def _mean_and_range(report: Report, group: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, mean, high = (f"{value:,.0f}" for value in (min(values), sum(values) / len(values), max(values)))
    said = mean if low == high else f"{mean} ({low} to {high})"
    return report.counted(said, len(values), group, report.fractions[-1])


def _shares(report: Report, shown: Sequence[str]) -> Table:
    last, rows = report.fractions[-1], []
    for group in shown:
        of = [row["gradient_share"] for row in report.rows(group, last)]
        cells = []
        for name in OBJECTIVES:
            values = [share[f"image_cls/{name}"] for share in of if f"image_cls/{name}" in share]
            said = f"{100 * sum(values) / len(values):.2f}" if values else "-"
            cells.append(report.counted(said, len(values), group, last) if values else said)
        rows.append([group, *cells])
    return Table(
        f"Share of the gradient at the image's [CLS], mean of the run, %, {last:.0%}", ["set", *OBJECTIVES], rows
    )
