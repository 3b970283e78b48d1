"""Peak growth of memory while the XMM head runs forward and backward once, in a process of its own.

python -m benchmarks.peak_memory "official order" cpu
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch


def peak_growth_mib(contender: str, device: torch.device) -> float:
    """Measure one contender of kernels.xmm_head in fp32, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", contender, device.type]
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
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
    small = torch.randn(64, 64, requires_grad=True)
    (small @ small).sum().backward()  # what the first product and backward of a process cost
    before = _resident()
    run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def _resident() -> float:
    """Return MiB of memory now; the peak so far must not lie above it, or it would hide the growth."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now, peak = (int(status.split(f"{key}:")[1].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    if peak - now > 50:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak back to now
    return now


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
