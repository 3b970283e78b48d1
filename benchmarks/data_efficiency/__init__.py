"""Does multi-level alignment learn more from less?  `python -m benchmarks data_efficiency --grid grids/NAME.yaml`

A grid is objective sets x fractions of the data x seeds. Each cell is a real training run (deepspeed launcher,
launch/pretrain.py) from the same start weights and in the same data order as the other sets of its seed, then
zero-shot measures, then one JSON row.

    grid.py  what a grid file says          sets.py      the objective sets
    data.py  data, subsets, start weights   identity.py  which code and configuration a row is of
    cell.py  one cell: train, measure       measures.py  what is measured
    rows.py  rows on disk                   runner.py    all cells, one after the other
    compare.py  statistics                  page.py      the report
"""

from benchmarks.data_efficiency.command import main

__all__ = ["main"]
