"""A rank of tests/engine/test_distributed.py: joins the group, says what it mapped and some errors, and is killed."""

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from simla_ds.engine.distributed import gather_objects, start


def main() -> None:
    ranks = start()
    dist.all_reduce(torch.ones(3))
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line.split("/dev/shm/")[1] for line in lines if "/dev/shm/deepspeed_allreduce_buffer" in line}
    mapped = gather_objects(sorted(names))
    if ranks.is_main:
        print(json.dumps({"port": os.environ["MASTER_PORT"], "mapped": mapped}), flush=True)
    ranks.say_first("error: the same on both")
    if not ranks.is_main:
        ranks.say_first("error: of one")
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
