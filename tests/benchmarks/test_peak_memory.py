"""Peaks of memory: of the process, or of a card."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peak_memory import fresh_environment, peak_growth_mib

SIZE = 64 << 20
"""Bytes: far above what a process takes and gives back by itself."""


PROGRAMME = """
import sys, torch
from benchmarks.peak_memory import peak_mib, restart_peak
where, size = torch.device(sys.argv[1]), int(sys.argv[2])
torch.ones(1, device=where)  # what a device takes once
before = restart_peak(where)
torch.ones(size // 4, device=where)
print(before, peak_mib(where), restart_peak(where), peak_mib(where))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_peak_counts_what_is_gone_and_is_forgotten_at_a_restart(device: str, project_root: Path):
    """In a process of its own: one that runs tests has memory to give out again without asking for more."""
    command = [sys.executable, "-c", PROGRAMME, device, str(SIZE)]
    ran = subprocess.run(command, cwd=project_root, env=fresh_environment(), capture_output=True, text=True, check=True)
    before, peak, restarted, after = map(float, ran.stdout.split())
    assert abs(peak - before - SIZE / 2**20) < 8  # the kernel counts pages of a process in batches
    assert abs(restarted - before) < 8
    assert after - before < 8


@pytest.mark.gpu
def test_workspaces_of_libraries_are_not_a_contenders(monkeypatch: pytest.MonkeyPatch):
    first, second = (peak_growth_mib("masked, unfused", torch.device("cuda")) for _ in range(2))
    assert first == second
