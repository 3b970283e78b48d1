"""Which CUDA cards a cell is trained and measured on; where there are none, the CPU does both."""

from __future__ import annotations

import os

import torch


def cards() -> list[str]:
    """Return the numbers of the cards that may be used: CUDA_VISIBLE_DEVICES, or all there are.

    None where DS_ACCELERATOR=cpu, which the launcher heeds too. Raises ValueError for cards that are named otherwise,
    which DeepSpeed's launcher cannot be told.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    found = [name.strip() for name in named.split(",")]
    if not all(name.isdigit() for name in found):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={named}: DeepSpeed's launcher takes numbers of cards, such as 0,1")
    return found


def device() -> str:
    """Return "cuda" or "cpu"."""
    return "cuda" if cards() else "cpu"


def slots(jobs: int, ranks: int) -> list[list[str]]:
    """Return the cards of each of so many cells side by side, `ranks` each; empty lists on a CPU.

    Raises ValueError when there are not enough for all.
    """
    found = cards()
    if found and jobs * ranks > len(found):
        raise ValueError(
            f"--jobs {jobs} x launch.ranks {ranks} need {jobs * ranks} cards, {len(found)} may be used; "
            f"set --jobs <= {len(found) // ranks}, or fewer launch.ranks in the grid"
        )
    return [found[n * ranks : (n + 1) * ranks] for n in range(jobs)]
