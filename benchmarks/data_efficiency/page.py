"""The report: report.md and report.html beside the rows they are made from, and the PNGs of plots.py."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data_efficiency.compare import (
    CONFIDENCE,
    POWER,
    by_seed,
    comparable,
    compare,
    estimate,
    pairs_needed,
)
from benchmarks.data_efficiency.grid import Grid
from benchmarks.data_efficiency.plots import draw_needed, draw_scores
from benchmarks.data_efficiency.rows import DONE, FAILED, Row, read_rows
from simla_ds.objectives import OBJECTIVES

HEADLINES = {
    "retrieval/itc/mean_recall": ("mean recall, ITC", "retrieval/chance/mean_recall"),
    "retrieval/itm/mean_recall": ("mean recall, ITM", "retrieval/chance/mean_recall"),
    "keywords/itc/average_precision": ("keyword AP, ITC", "keywords/prior/average_precision"),
    "keywords/psl/average_precision": ("keyword AP, PSL head", "keywords/prior/average_precision"),
    "swaps/itc/mean": ("swap probes, ITC", ""),
    "swaps/itm/mean": ("swap probes, ITM", ""),
    "grounding/proposal_iou50": ("grounding accuracy", "grounding/proposal_random"),
    "grounding/pointing": ("pointing", "grounding/centre"),
}
"""Measures of the first split in percent: what they are called, and the measure that says what chance gets (50 where
there is none). The first is the one that fractions are compared by."""
PRIMARY = next(iter(HEADLINES))
MEASURES_SAID = (
    "Mean recall: of R@1, R@5 and R@10, both ways. Keyword AP: things of the kit ranked by how likely they are in a "
    "picture; chance ranks them by how common they are. Swap probes: a caption against itself with an attribute, a "
    "noun or a relation changed; chance is 50. Grounding accuracy: the named one of the scene's boxes; pointing: the "
    "heat map's peak lies in its box, and chance points at the middle. A dash: the set trains nothing that could tell."
)


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


class Report:
    """What the rows of a grid say. Rows that failed or are missing are named, never averaged."""

    def __init__(self, grid: Grid, rows: Sequence[Row], remarks: Sequence[str]):
        self.grid, self.rows, self.remarks = grid, rows, remarks
        self.split = grid.measure.splits[0]
        cells = grid.all_cells
        self.groups = list(dict.fromkeys(cell.group for cell in cells))
        self.fractions = sorted({cell.fraction for cell in cells})
        self.known = {row["cell"]: row for row in rows}
        self.done = [row for row in rows if row["status"] == DONE and row["cell"] in {cell.name for cell in cells}]

    def values(self, group: str, fraction: float, measure: str, who: str = "student", split: str = "") -> dict:
        """Return a measure by seed."""
        return by_seed(self.done, group, fraction, f"{split or self.split}/{measure}", who)

    def at(self, group: str, fraction: float, measure: str, who: str = "student", split: str = "") -> str:
        """Return a table's cell: mean and standard error, and the number of seeds where it is not the grid's."""
        found = estimate(self.values(group, fraction, measure, who, split))
        if found is None:
            return "-"
        wanted = sum(cell.group == group and cell.fraction == fraction for cell in self.grid.all_cells)
        return f"{found}" + (f" ({found.count} of {wanted})" if found.count < wanted else "")

    def state(self) -> list[str]:
        """Say how much of the grid there is, and of what the rows are."""
        states = Counter(self.known[c.name]["status"] if c.name in self.known else "open" for c in self.grid.all_cells)
        lines = [f"{len(self.grid.all_cells)} cells: " + ", ".join(f"{n} {name}" for name, n in sorted(states.items()))]
        failed = [c.name for c in self.grid.all_cells if self.known.get(c.name, {}).get("status") == FAILED]
        lines += [f"failed, left out of every mean: {', '.join(failed)}"] if failed else []
        for name in ("commit", "code_hash", "grid_hash"):
            lines.append(f"{name.replace('_', ' ')}: {', '.join(sorted({row[name] for row in self.done}))}")
        machines = {
            f"{e['processor']}, {e['ranks']} rank(s) of {e['threads']} thread(s), {e['device']}, torch {e['torch']}"
            for e in (row["environment"] for row in self.done)
        }
        ceilings = {row["metrics"]["student"][f"{self.split}/retrieval/ceiling/mean_recall"] for row in self.done}
        lines.append(f"run on: {'; '.join(sorted(machines))}")
        lines.append(f"ceiling of mean recall (captions said of several pictures): {_range(ceilings)}")
        return lines + list(self.remarks)

    def sentences(self) -> list[str]:
        """Return a computed sentence per comparison: every fraction by the primary measure, the whole set by all."""
        said = []
        for first, second in self.grid.sentences:
            for measure, (name, _) in HEADLINES.items():
                for fraction in self.fractions if measure == PRIMARY else self.fractions[-1:]:
                    mine, theirs = (self.values(group, fraction, measure) for group in (first, second))
                    if found := compare(first, second, mine, theirs):
                        said.append(f"{name} at {fraction:.0%}, {found}.")
        return said

    def means(self, group: str) -> list[tuple[int, float]]:
        """Return (pairs, mean primary score) of a group by fraction."""
        points = []
        for fraction in self.fractions:
            pairs = {row["pairs"] for row in self.done if (row["group"], row["fraction"]) == (group, fraction)}
            found = estimate(self.values(group, fraction, PRIMARY))
            points += [(min(pairs), found.mean)] if found else []
        return points

    def needed(self) -> Table:
        """Return how many pairs each group needs for the score that each other one has with all pairs."""
        curves = {group: self.means(group) for group in self.groups}
        whole = {group: curve[-1] for group, curve in curves.items() if len(curve) == len(self.fractions) > 1}
        rows = []
        for group in whole:
            cells = []
            for pairs, score in whole.values():
                count = pairs_needed(curves[group], score)
                cells.append("not reached" if count is None else f"{count:,.0f} ({count / pairs:.0%})")
            rows.append([group, *cells])
        title = "Pairs needed for another set's score with all pairs (mean recall, ITC; read off between fractions)"
        return Table(title, ["needed by", *(f"{name} ({score:.1f})" for name, (_, score) in whole.items())], rows)

    def tables(self) -> list[Table]:
        """Return every table."""
        last, shown = (
            self.fractions[-1],
            [group for group in self.groups if any(r["group"] == group for r in self.done)],
        )
        names = [f"{fraction:.0%}" for fraction in self.fractions]
        primary = HEADLINES[PRIMARY][0]
        by_fraction = [[g, *(self.at(g, fraction, PRIMARY) for fraction in self.fractions)] for g in shown]
        tables = [Table(f"{primary} on {self.split} by fraction of the pairs, %", ["student", *names], by_fraction)]
        for who in ("student", "teacher"):
            rows = [[g, *(self.at(g, last, measure, who) for measure in HEADLINES)] for g in shown]
            guess = ["chance", *(self._chance(key) for _, key in HEADLINES.values())]
            header = [who, *(name for name, _ in HEADLINES.values())]
            tables.append(Table(f"{self.split} at {last:.0%}, {who}, %", header, [*rows, guess]))
        for split in self.grid.measure.splits[1:]:
            rows = [[g, *(self.at(g, last, measure, split=split) for measure in HEADLINES)] for g in shown]
            header = ["student", *(name for name, _ in HEADLINES.values())]
            tables.append(Table(f"{split} at {last:.0%}, student, %", header, rows))
        tables += [self.needed(), self._cost(shown, last), self._shares(shown, last)]
        return [table for table in tables if table.rows]

    def _chance(self, key: str) -> str:
        found = {row["metrics"]["student"].get(f"{self.split}/{key}") for row in self.done} - {None}
        return _range(found) if key else "50"

    def _cost(self, shown: Iterable[str], fraction: float) -> Table:
        keys: dict[str, Callable[[Row], float]] = {
            "pairs seen": lambda row: row["pairs_seen"],
            "GFLOP, counted": lambda row: row["gflop"],
            "seconds, training command": lambda row: row["seconds"],
            "CPU seconds, training command": lambda row: row["cpu_seconds"],
            "CPU seconds, measuring": lambda row: row["measure_cpu_seconds"],
        }
        rows = []
        for group in shown:
            of = [row for row in self.done if (row["group"], row["fraction"]) == (group, fraction)]
            rows.append([group, *(f"{sum(map(get, of)) / len(of):,.0f}" if of else "-" for get in keys.values())])
        return Table(f"Cost of a cell at {fraction:.0%}", ["set", *keys], rows)

    def _shares(self, shown: Iterable[str], fraction: float) -> Table:
        names = tuple(OBJECTIVES)
        rows = []
        for group in shown:
            of = [r["gradient_share"] for r in self.done if (r["group"], r["fraction"]) == (group, fraction)]
            cells = []
            for name in names:
                values = [share[f"image_cls/{name}"] for share in of if f"image_cls/{name}" in share]
                cells.append(f"{100 * sum(values) / len(values):.2f}" if values else "-")
            rows.append([group, *cells])
        return Table(
            f"Share of the gradient at the image's [CLS], mean of the run, %, {fraction:.0%}", ["set", *names], rows
        )


def write_report(grid: Grid, folder: Path, code: str) -> int:
    """Write report.md, report.html and the PNGs into the rows' folder; return the exit status."""
    rows, remarks = comparable(read_rows(folder), grid.shared_hash, code)
    report = Report(grid, rows, remarks)
    if not report.done:
        raise ValueError(f"{folder} has no finished cell of this grid yet; run it without --report")
    pictures = draw_scores(report.done, report.groups, f"{report.split}/{PRIMARY}", HEADLINES[PRIMARY][0], folder)
    pictures += draw_needed({g: report.means(g) for g in report.groups}, grid.sentences, HEADLINES[PRIMARY][0], folder)
    title, state, sentences, tables = (
        f"Data efficiency: {grid.name}",
        report.state(),
        report.sentences(),
        report.tables(),
    )
    notes = "Mean ± standard error over seeds."
    if sentences:
        notes += (
            f" Differences are paired by seed, with {CONFIDENCE:.0%} intervals (Student's t), not corrected for the "
            f"{len(sentences)} comparisons. Detectable: the smallest true difference that would have been found "
            f"significant with a power of {POWER:.0%}."
        )
    markdown = [f"# {title}", grid.about, _list(state, "- {}"), notes, MEASURES_SAID]
    markdown += ["## Differences", _list(sentences, "- {}")] if sentences else []
    markdown += [table.markdown() for table in tables]
    markdown += [_list(pictures, "![{0}]({0})")]
    (folder / "report.md").write_text("\n\n".join(part for part in markdown if part) + "\n", encoding="utf-8")
    body = [f"<h1>{html.escape(title)}</h1><p>{html.escape(grid.about)}</p>", _items(state)]
    body += [f"<p>{html.escape(notes)}</p><p>{html.escape(MEASURES_SAID)}</p>"]
    body += [_list(pictures, '<img src="{0}" alt="{0}">')]
    body += ["<h2>Differences</h2>", _items(sentences)] if sentences else []
    body += [table.page() for table in tables]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    (folder / "report.html").write_text(
        f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n",
        encoding="utf-8",
    )
    print(f"{folder / 'report.md'}\n{folder / 'report.html'}\n" + "\n".join([*state, *sentences]))
    return 0


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


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    if not found:
        return "-"
    return f"{found[0]:.1f}" if found[-1] - found[0] < 0.05 else f"{found[0]:.1f} to {found[-1]:.1f}"
