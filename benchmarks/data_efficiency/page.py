"""report.md and report.html beside the rows they are made from, and the PNGs of plots.py."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from benchmarks.data_efficiency.comparable import comparable
from benchmarks.data_efficiency.compare import CONFIDENCE
from benchmarks.data_efficiency.conditions import conditions
from benchmarks.data_efficiency.grid import Grid
from benchmarks.data_efficiency.headlines import PRIMARY, explained
from benchmarks.data_efficiency.plots import draw_needed, draw_scores
from benchmarks.data_efficiency.report import Report
from benchmarks.data_efficiency.rows import read_rows
from benchmarks.data_efficiency.tables import tables

NOTES = (
    "Mean ± standard error over seeds; (2 of 3): of so many of the grid's. A seed decides start weights, the order of "
    "the data and which pairs a fraction holds. All cells are measured on the same test pictures: intervals say "
    "nothing of how results would change with other pictures."
)


def write_report(grid: Grid, folder: Path, code: str) -> int:
    """Write report.md, report.html and the PNGs into the rows' folder; return the exit status."""
    recipes = {cell.name: grid.settings(cell) for cell in grid.all_cells}
    rows, remarks = comparable(read_rows(folder), grid.shared_hash, code, recipes)
    report = Report(grid, rows, remarks)
    name = report.headlines[PRIMARY].name
    seeds = {fraction: report.shared_seeds(fraction) for fraction in report.fractions}
    pictures = draw_scores(report.done, report.groups, seeds, f"{report.split}/{PRIMARY}", name, folder)
    pictures += draw_needed({group: report.curves(group) for group in report.groups}, grid.sentences, name, folder)
    title, state, verdicts = f"Data efficiency: {grid.name}", report.state(), report.verdicts()
    notes = [NOTES, _how_compared(report)] if verdicts else [NOTES]
    notes.append(explained(grid.measure.rerank))
    lists = {"Conditions": conditions(report.done, grid.measure.rerank), "Differences": verdicts}
    lists["What could have been seen"] = report.sensitivity()
    lists["Further differences, without a verdict"] = report.others()
    lists = {heading: lines for heading, lines in lists.items() if lines}
    made = tables(report)
    markdown = [f"# {title}", grid.about, _list(state, "- {}"), *notes]
    markdown += [part for heading, lines in lists.items() for part in (f"## {heading}", _list(lines, "- {}"))]
    markdown += [table.markdown() for table in made]
    markdown += [_list(pictures, "![{0}]({0})")]
    (folder / "report.md").write_text("\n\n".join(part for part in markdown if part) + "\n", encoding="utf-8")
    body = [f"<h1>{html.escape(title)}</h1><p>{html.escape(grid.about)}</p>", _items(state)]
    body += [f"<p>{html.escape(note)}</p>" for note in notes]
    body += [_list(pictures, '<img src="{0}" alt="{0}">')]
    body += [part for heading, lines in lists.items() for part in (f"<h2>{heading}</h2>", _items(lines))]
    body += [table.page() for table in made]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    (folder / "report.html").write_text(
        f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n",
        encoding="utf-8",
    )
    print(f"{folder / 'report.md'}\n{folder / 'report.html'}\n" + "\n".join([*state, *verdicts]))
    return 0


def _how_compared(report: Report) -> str:
    return (
        f"Differences are paired by seed, with {CONFIDENCE:.0%} intervals (Student's t), each for itself. How much "
        "they vary is estimated from all sets of a fraction together, as if it were equal in each (randomised complete "
        "blocks, seeds as blocks): a few seeds of two sets alone could not tell. Verdicts are given on one family: "
        f"{report.headlines[PRIMARY].name} of the student on {report.split}, in the grid's {len(report.family())} "
        "comparisons at its fractions, finished or not, by Holm's correction."
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1c1c1c }
h2 { margin-top: 2rem; font-size: 1.1rem } img { max-width: 49%; min-width: 24rem }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left }
"""


def _list(lines: Iterable[str], pattern: str) -> str:
    return "\n".join(pattern.format(line) for line in lines)


def _items(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
