"""Peaks of memory: of the process, or of a card."""

import pytest
import torch

from benchmarks.peak_memory import peak_growth_mib, peak_mib, restart_peak

SIZE = 64 << 20
"""Bytes: far above what a process takes and gives back by itself."""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_peak_counts_what_is_gone_and_is_forgotten_at_a_restart(device: str):
    where = torch.device(device)
    torch.ones(1, device=where)  # what a device takes once
    before = restart_peak(where)
    del (made := {"tensor": torch.ones(SIZE // 4, device=where)})["tensor"]
    assert not made
    assert abs(peak_mib(where) - before - SIZE / 2**20) < 8  # the kernel counts pages of a process in batches
    assert abs(restart_peak(where) - before) < 8
    assert peak_mib(where) - before < 8


@pytest.mark.gpu
def test_workspaces_of_libraries_are_not_a_contenders(monkeypatch: pytest.MonkeyPatch):
    first, second = (peak_growth_mib("masked, unfused", torch.device("cuda")) for _ in range(2))
    assert first == second
