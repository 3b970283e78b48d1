"""Cells side by side."""

import time
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.data_efficiency import runner


def test_no_two_cells_have_a_card_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    busy: set[str] = set()
    used: list[str] = []
    lock = Lock()

    class Watched(runner.Runner):
        def _run_on(self, cards: Any, planned: Any) -> str:
            with lock:
                assert not busy & set(cards)
                busy.update(cards)
                used.extend(cards)
            time.sleep(0.02)
            with lock:
                busy.difference_update(cards)
            if planned.cell.name == "1":
                raise OSError("a cell that ends badly gives its cards back")
            return "done"

    monkeypatch.setattr(runner, "slots", lambda jobs, ranks: [[str(n)] for n in range(jobs * ranks)])
    cells: list[Any] = [
        SimpleNamespace(cell=SimpleNamespace(name=str(n)), grid=SimpleNamespace(launch=SimpleNamespace(ranks=1)))
        for n in range(6)
    ]
    Watched([], tmp_path).run([cell for cell in cells if cell.cell.name != "1"], jobs=2)
    assert (set(used), len(used)) == ({"0", "1"}, 5)
    with pytest.raises(OSError, match="gives its cards back"):
        Watched([], tmp_path).run(cells[:2], jobs=2)
    assert busy == set()
