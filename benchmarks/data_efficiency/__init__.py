"""Does multi-level alignment learn more from less?  `python -m benchmarks data_efficiency --grid grids/NAME.yaml`

A grid is objective sets x fractions of the data x seeds. Each cell is a real training run (deepspeed launcher,
launch/pretrain.py) from the same start weights and in the same data order as the other sets of its seed, then
zero-shot measures, then one JSON row.

    grid.py  what a grid file says          sets.py        the objective sets
    data.py  data, subsets, start weights   identity.py    which code and configuration a row is of
    cell.py  one cell: train, measure       measures.py    what is measured
    cost.py  operations, counted            devices.py     which cards a cell has
    rows.py  rows on disk                   runner.py      all cells, `--jobs` side by side
    compare.py  statistics                  comparable.py  which rows may be compared
    needed.py   pairs for a given score     headlines.py   which measures are shown
    report.py   what rows say               conditions.py  under which conditions
    tables.py, plots.py, page.py            the report's parts, and the whole
"""

from benchmarks.data_efficiency.command import main

__all__ = ["main"]
