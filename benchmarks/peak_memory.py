"""Peak growth of memory while the XMM head runs forward and backward once, in a process of its own.

python -m benchmarks.peak_memory "official order" cpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


def peak_growth_mib(contender: str, device: torch.device) -> float:
    """Measure one contender of kernels.xmm_head in fp32, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", contender, device.type]
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run(command, cwd=root, env=fresh_environment(), capture_output=True, text=True, check=True)
    return float(ran.stdout.split()[-1])


def main(contender: str, device: torch.device) -> None:
    """Print MiB between just before and the highest point."""
    from benchmarks.kernels import xmm_head

    torch.manual_seed(0)
    run = xmm_head(device, torch.float32)[contender]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    run()  # what a process keeps after its first products: buffers of libraries
    restart_peak()
    before = memory_mib("VmRSS")
    run()
    print(memory_mib("VmHWM") - before)


def fresh_environment() -> dict[str, str]:
    """Return the environment for a process whose memory is measured: glibc gives back what is freed."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def restart_peak() -> None:
    """Let VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_mib(field: str) -> float:
    """Return a line of this process's memory status: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
