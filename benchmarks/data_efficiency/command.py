"""The command line of `python -m benchmarks data_efficiency`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.data_efficiency.grid import Grid

RESULTS = Path(__file__).resolve().parents[1] / "results" / "data_efficiency"
WORK = Path("runs") / "data_efficiency"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks data_efficiency",
        description="Objective sets x fractions of the data x seeds: train each cell that has no row yet, measure it.",
        allow_abbrev=False,
    )
    made.add_argument("--grid", required=True, type=Path, metavar="FILE", help="grid file, such as grids/scenes.yaml")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say which cells are done, failed and open; run nothing")
    what.add_argument("--cell", metavar="NAME", help="run this one cell; where it has a row, see whether it gives the "
                      "same numbers again")  # fmt: skip
    what.add_argument("--report", action="store_true", help="write report.md and report.html from the rows there are")
    made.add_argument("--retry", action="store_true", help="run failed cells as well")
    made.add_argument("--smoke", action="store_true", help="every set for a few steps on a few pairs, rows in --work")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="cells side by side (default: 1)")
    made.add_argument("--code", default="", metavar="HASH", help="report rows of this code (default: most rows)")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="rows and report, in a folder named "
                      "after the grid (default: benchmarks/results/data_efficiency)")  # fmt: skip
    made.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="data and run folders (default: "
                      "runs/data_efficiency)")  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> int:
    """Run, list or report. Exit status 0 done, 1 a cell failed or gave other numbers, 2 wrong use or bad input."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.jobs < 1:
        made.error(f"--jobs {arguments.jobs} must be at least 1")
    from benchmarks.data_efficiency.grid import read_grid

    try:
        grid = read_grid(arguments.grid)
        if arguments.smoke:
            grid = grid.smoke()
        results = (arguments.work if arguments.smoke else arguments.results).resolve() / grid.name
        if arguments.report:
            from benchmarks.data_efficiency.page import write_report

            return write_report(grid, results, arguments.code)
        os.environ.setdefault("OMP_NUM_THREADS", str(grid.launch.threads))  # before torch is imported
        return _run(arguments, grid, results)
    except (ValueError, OSError) as error:
        print(f"data_efficiency: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, grid: Grid, results: Path) -> int:
    from benchmarks.data_efficiency.cell import Planned
    from benchmarks.data_efficiency.data import Pairs
    from benchmarks.data_efficiency.rows import FAILED
    from benchmarks.data_efficiency.runner import Runner, state, table
    from benchmarks.timing import environment

    cells = [grid.find(arguments.cell)] if arguments.cell else grid.all_cells
    if (commit := environment()["commit"]).endswith("-dirty"):
        print(f"data_efficiency: uncommitted changes: rows will say {commit}, and so will the report", file=sys.stderr)
    data = grid.data
    pairs = Pairs((arguments.work / grid.name).resolve(), data.scenes, data.train, data.test)
    if unknown := [name for name in grid.measure.splits if name not in pairs.splits]:
        raise ValueError(
            f"measure.splits: no {', '.join(unknown)} in this grid's data, which have {', '.join(pairs.splits)}"
        )
    planned = [Planned(grid, cell, pairs) for cell in cells]
    if arguments.list:
        print(table(planned, results))
        return 0
    if arguments.cell:
        return _one(planned[0], results)
    wanted = ("open", FAILED) if arguments.retry else ("open",)
    waiting = [one for one in planned if state(one, results) in wanted]
    names = ["--grid", str(arguments.grid.resolve()), "--results", str(arguments.results.resolve())]
    names += ["--work", str(arguments.work.resolve()), *(["--smoke"] if arguments.smoke else [])]
    Runner(names, results).run(waiting, arguments.jobs)
    print(table(planned, results))
    failed = [one.cell.name for one in planned if state(one, results) == FAILED]
    if failed:
        print(f"data_efficiency: {len(failed)} cell(s) failed; --retry runs them again", file=sys.stderr)
    return 1 if failed else 0


def _one(planned, results: Path) -> int:
    """Run one cell. Its row is written when there is no finished one, and otherwise compared with."""
    from benchmarks.data_efficiency.cell import SAME, run_cell
    from benchmarks.data_efficiency.rows import DONE, read_row, write_row
    from benchmarks.data_efficiency.runner import file_of

    file = file_of(planned, results)
    stored = read_row(file)
    try:
        row = run_cell(planned)
    except RuntimeError as error:
        print(f"{planned.cell.name}: {error}", file=sys.stderr)
        return 1
    if stored is None or stored["status"] != DONE:
        write_row(file, row)
        print(f"{planned.cell.name}: {file}")
        return 0
    other = [name for name in SAME if row[name] != stored[name]]
    print(f"{planned.cell.name}: {', '.join(other) + ' differ from' if other else 'the same numbers as'} {file}")
    return 1 if other else 0
