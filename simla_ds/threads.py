"""CPU threads per rank. Imports nothing heavy: it must run before torch is imported."""

from __future__ import annotations

import os


def set_threads() -> int:
    """Give each rank of this node its share of the cores, unless OMP_NUM_THREADS is set; return the number.

    Without this two ranks on two cores run four threads, each waiting for the others.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // local_ranks))
    return int(os.environ["OMP_NUM_THREADS"])
