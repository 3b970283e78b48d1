"""What the rows of a grid say: values, sentences, and of what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.data_efficiency.compare import (
    CONFIDENCE,
    POWER,
    Comparison,
    by_seed,
    compare,
    detectable,
    estimate,
    holm,
)
from benchmarks.data_efficiency.grid import Grid
from benchmarks.data_efficiency.headlines import PRIMARY, filled_in, headlines
from benchmarks.data_efficiency.needed import Curve
from benchmarks.data_efficiency.rows import DONE, FAILED, Row


@dataclass(frozen=True)
class PlannedComparison:
    """A comparison that the grid asks for, and what there is of it."""

    measure: str
    fraction: float
    found: Comparison | None


class Report:
    """Rows that failed or are missing are named, never averaged."""

    def __init__(self, grid: Grid, rows: Sequence[Row], remarks: Sequence[str]):
        """rows, remarks: from comparable. Raises ValueError when no cell of the grid is finished."""
        self.grid, self.remarks = grid, remarks
        self.split = grid.measure.splits[0]
        self.headlines = headlines(grid.measure.rerank)
        cells = grid.all_cells
        self.groups = list(dict.fromkeys(cell.group for cell in cells))
        self.fractions = sorted({cell.fraction for cell in cells})
        self.known = {row["cell"]: row for row in rows}
        names = {cell.name for cell in cells}
        finished = [row for row in rows if row["status"] == DONE and row["cell"] in names]
        self.done = [filled_in(row, grid) for row in finished]
        if not self.done:
            raise ValueError(f"grid {grid.name} has no finished cell yet; run it without --report")

    def values(self, group: str, fraction: float, measure: str, who: str = "student", split: str = "") -> dict:
        """Return a measure by seed."""
        return by_seed(self.done, group, fraction, f"{split or self.split}/{measure}", who)

    def rows(self, group: str, fraction: float) -> list[Row]:
        """Return the finished rows of a group at a fraction."""
        return [row for row in self.done if (row["group"], row["fraction"]) == (group, fraction)]

    def counted(self, said: str, count: int, group: str, fraction: float) -> str:
        """Return a mean's text, with the number of its seeds where it is not the grid's."""
        wanted = sum(cell.group == group and cell.fraction == fraction for cell in self.grid.all_cells)
        return said + (f" ({count} of {wanted})" if count < wanted else "")

    def at(self, group: str, fraction: float, measure: str, who: str = "student", split: str = "") -> str:
        """Return mean and standard error of a measure, or a dash."""
        found = estimate(self.values(group, fraction, measure, who, split))
        return "-" if found is None else self.counted(f"{found}", found.count, group, fraction)

    def shared_seeds(self, fraction: float) -> set[int]:
        """Return the seeds that all groups with a finished cell at a fraction have finished."""
        of = [{row["seed"] for row in self.rows(group, fraction)} for group in self.groups]
        return set.intersection(*filter(None, of)) if any(of) else set()

    def curves(self, group: str) -> dict[int, Curve]:
        """Return (pairs, primary score) of a group by seed, of seeds that it has at every fraction of the grid."""
        found: dict[int, list[tuple[int, float]]] = {}
        for fraction in self.fractions:
            for row in self.rows(group, fraction):
                found.setdefault(row["seed"], []).append(
                    (row["pairs"], row["metrics"]["student"][f"{self.split}/{PRIMARY}"])
                )
        return {seed: curve for seed, curve in found.items() if len(curve) == len(self.fractions) > 1}

    def state(self) -> list[str]:
        """Say how much of the grid there is, and of what the rows are."""
        cells = self.grid.all_cells
        states = Counter(self.known[c.name]["status"] if c.name in self.known else "open" for c in cells)
        lines = [f"{len(cells)} cells: " + ", ".join(f"{n} {name}" for name, n in sorted(states.items()))]
        failed = [c.name for c in cells if self.known.get(c.name, {}).get("status") == FAILED]
        lines += [f"failed, left out of every mean: {', '.join(failed)}"] if failed else []
        for name in ("commit", "code_hash", "grid_hash"):
            lines.append(f"{name.replace('_', ' ')}: {', '.join(sorted({row[name] for row in self.done}))}")
        dirty = sorted(row["cell"] for row in self.done if row["commit"].endswith("-dirty"))
        if dirty:
            lines.append(
                "run from a tree with uncommitted changes, so that no commit gives these numbers again: "
                + ("all cells" if len(dirty) == len(self.done) else ", ".join(dirty))
            )
        machines = {
            f"{e['processor']}, {e['ranks']} rank(s) of {e['threads']} thread(s), {e['device']}, torch {e['torch']}"
            for e in (row["environment"] for row in self.done)
        }
        ceilings = {row["metrics"]["student"][f"{self.split}/retrieval/ceiling/mean_recall"] for row in self.done}
        lines.append(f"run on: {'; '.join(sorted(machines))}")
        lines.append(f"ceiling of mean recall (captions said of several pictures): {spread(ceilings)}")
        return lines + list(self.remarks)

    def family(self) -> list[PlannedComparison]:
        """Return the comparisons that get a verdict: the grid's, by the primary measure, at each fraction planned."""
        cells = {(cell.group, cell.fraction) for cell in self.grid.all_cells}
        return [
            self._planned(first, second, PRIMARY, fraction)
            for first, second in self.grid.sentences
            for fraction in self.fractions
            if {(first, fraction), (second, fraction)} <= cells
        ]

    def verdicts(self) -> list[str]:
        """Return a sentence, with a verdict, for each finished comparison of the family."""
        family = self.family()
        adjusted = holm([one.found.difference.p_value if one.found else 1.0 for one in family])
        said = []
        for one, p in zip(family, adjusted, strict=True):
            if one.found is None:
                continue
            verdict = f"{'' if p < 1 - CONFIDENCE else 'not '}significant (Holm's p {p:.2g})"
            said.append(f"{self._said(one)}: {verdict if len(one.found.seeds) > 1 else 'nothing can be said'}.")
        return said

    def others(self) -> list[str]:
        """Return a sentence, without a verdict, for each comparison by another measure with all pairs."""
        planned = [
            self._planned(first, second, measure, self.fractions[-1])
            for first, second in self.grid.sentences
            for measure in self.headlines
            if measure != PRIMARY
        ]
        return [f"{self._said(one)}." for one in planned if one.found]

    def sensitivity(self) -> list[str]:
        """Say which true difference each fraction's seeds would have shown."""
        family, lines = self.family(), []
        for fraction in self.fractions:
            found = [one.found.difference for one in family if one.fraction == fraction and one.found]
            known = [(one.error, one.freedom, one.count) for one in found if one.error is not None]
            if known:
                error, freedom, seeds = max(known, key=lambda one: one[1:])
                alone, all_of_them = (detectable(error, freedom, count) for count in (1, len(family)))
                lines.append(
                    f"smallest true difference in {self.headlines[PRIMARY].name} that {seeds} seeds at {fraction:.0%} "
                    f"would show to be significant with a power of {POWER:.0%}: {alone:.1f} if it were the only "
                    f"comparison, {all_of_them:.1f} as the first of {len(family)} (noncentral t, {freedom} degrees of "
                    "freedom)"
                )
        return lines

    def _planned(self, first: str, second: str, measure: str, fraction: float) -> PlannedComparison:
        block = {group: self.values(group, fraction, measure) for group in self.groups}
        return PlannedComparison(measure, fraction, compare(first, second, block))

    def _said(self, one: PlannedComparison) -> str:
        assert one.found is not None
        gflop = [
            sum(row["gflop"] for row in self.rows(group, one.fraction) if row["seed"] in one.found.seeds)
            for group in (one.found.first, one.found.second)
        ]
        name = self.headlines[one.measure].name
        return f"{name} at {one.fraction:.0%}, {one.found}, at {gflop[0] / gflop[1]:.2f} times the training GFLOP"


def spread(values: Iterable[float]) -> str:
    """Say a number, or the range of several."""
    found = sorted(values)
    if not found:
        return "-"
    return f"{found[0]:.1f}" if found[-1] - found[0] < 0.05 else f"{found[0]:.1f} to {found[-1]:.1f}"
