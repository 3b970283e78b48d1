"""A rank of tests/engine/test_distributed.py: joins the group, says what it mapped and some errors, and is killed."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from simla_ds.engine.distributed import gather_objects, start


def main() -> None:
    ranks = start()
    dist.all_reduce(torch.ones(3))
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = gather_objects([line for line in lines if "/dev/shm/deepspeed" in line])
    compiled = gather_objects([name for name in sys.modules if name.startswith("deepspeed_")])
    if ranks.is_main:
        print(json.dumps({"mapped": mapped, "compiled": compiled}), flush=True)
    ranks.say_first("error: the same on both")
    if not ranks.is_main:
        ranks.say_first("error: of one")
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
