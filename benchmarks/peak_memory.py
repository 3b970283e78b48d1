"""Peak growth of memory while the XMM head runs forward and backward once, in a process of its own.

python -m benchmarks.peak_memory "official order" cpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.timing import CPU


def peak_growth_mib(contender: str, device: torch.device) -> float:
    """Measure one contender of kernel_cases.xmm_head in fp32, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", contender, device.type]
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run(command, cwd=root, env=fresh_environment(), capture_output=True, text=True, check=True)
    return float(ran.stdout.split()[-1])


def main(contender: str, device: torch.device) -> None:
    """Print MiB between just before and the highest point."""
    from benchmarks.kernel_cases import xmm_head

    torch.manual_seed(0)
    run = xmm_head(device, torch.float32).runs[contender]
    run()  # what a process keeps after its first products: buffers and workspaces of libraries
    before = restart_peak(device)
    run()
    print(peak_mib(device) - before)


def fresh_environment() -> dict[str, str]:
    """Return the environment for a process whose memory is measured: glibc gives back what is freed at once."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def kept_environment() -> dict[str, str]:
    """Return the environment for a process that is timed: glibc keeps what is freed for the next tensor.

    To be given new pages from the kernel for each took a seventh of our step at full size and a fifth of the published
    order's: that would measure the kernel, and flatter us.
    """
    kept = str(1 << 40)
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": kept, "MALLOC_TRIM_THRESHOLD_": kept}


def restart_peak(device: torch.device = CPU) -> float:
    """Let the peak start anew; return the MiB in use now: of a card what is allocated there, else the process's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status_mib("VmRSS")


def peak_mib(device: torch.device = CPU) -> float:
    """Return the MiB at the highest point since restart_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
