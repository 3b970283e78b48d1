"""Ranks: starting, talking about it once, ending."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import sys
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

T = TypeVar("T")
ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737), to find the interface that leads out."""
MOST_FILES = 65_536
"""Open files that a process may ask for, where the system allows it."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line once."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def say_first(self, line: str) -> None:
        """Print a line that any rank may have, such as an error: on the first rank that comes with it, with its name.

        No rank waits for another: they may have other errors, none, or be gone.
        """
        if self.world_size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            try:
                if store.add(f"said/{hashlib.sha256(line.encode()).hexdigest()}", 1) > 1:
                    return
            except RuntimeError:  # rank 0 ended, and the store with it
                pass
        where = "" if self.is_main else f" (rank {self.rank}, {socket.gethostname()})"
        print(f"{line}{where}", file=sys.stderr, flush=True)


def start(patience: float = 0) -> Ranks:
    """Join the process group that the launcher describes; alone, make one of a single process.

    Args:
        patience: seconds that a rank may be kept from the others, by its data for instance, and say so itself. The
            group gives up later than that.

    Raises:
        ValueError: a job of several processes whose ranks nobody told.
    """
    where: dict[str, Any] = {}
    if "RANK" not in os.environ:
        _refuse_lonely_ranks()
        # a file of its own, since a port found free may be taken by the time that it is used
        where = {
            "init_method": f"file://{tempfile.gettempdir()}/simla_ds_{uuid.uuid4().hex}",
            "rank": 0,
            "world_size": 1,
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # where pip put ninja, which torch looks for on PATH; one and the same at every start, or ops are compiled again
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.14 renames: nothing a user can act on
    warnings.filterwarnings("ignore", r".*torch\.distributed.* is deprecated", FutureWarning)
    _settle_gloo_interface()
    _allow_many_sockets()
    accelerator: Any = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    _leave_out_shared_memory()
    limit = max(default_pg_timeout, timedelta(seconds=patience + 120))
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(), verbose=False, timeout=limit, **where
    )
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), torch.device(accelerator.current_device_name()))


def _refuse_lonely_ranks() -> None:
    """Raise ValueError where a job has several processes but no RANK: each would train alone, into one folder."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            raise ValueError(
                f"{name}={os.environ[name]}, but RANK is not set: start one `deepspeed` launcher per node "
                "(--no_ssh --node_rank), or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )


def _settle_gloo_interface() -> None:
    """Have gloo listen on the way to MASTER_ADDR, where the other nodes are.

    Left alone it takes what the host's name stands for, and that is often loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    head = os.environ["MASTER_ADDR"]
    own = _own_address(head)
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)  # torchrun's, DeepSpeed's
    if own.startswith("127.") and here < ranks and head != "localhost" and not head.startswith("127."):
        own = _own_address(ELSEWHERE)  # this is the head node, which by many /etc/hosts is loopback to itself
        if not own:
            raise ValueError(
                f"{head} is loopback on {socket.gethostname()}, where the other nodes' ranks cannot reach gloo; set "
                "GLOO_SOCKET_IFNAME to the network interface between the nodes"
            )
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _own_address(other: str) -> str:
    """Return this host's IPv4 address on the way to another; empty where there is no way, and gloo's choice stands."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))  # sends nothing, but finds the way
        except OSError:
            return ""
        return probe.getsockname()[0]


def _allow_many_sockets() -> None:
    """Raise this process's limit of open files: gloo connects every rank with every other, shards stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling collectives in shared memory, which no training calls.

    DeepSpeed 0.19.8 compiles them for a minute at a CPU's first start, and each run would leave 66 MiB a rank in
    /dev/shm for good; only its tensor-parallel inference asks for them (comm/torch.py, inference_all_reduce).
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def finish(status: int = 0) -> None:
    """Leave the process group: at ZeRO-3 a process that ends without may abort.

    After an error, status not 0, NCCL would wait for ranks that are not coming: the process ends here and now, so that
    the launcher ends the others.
    """
    if not dist.is_initialized():
        return
    if status and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value on every rank, in rank order."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def require_alike(what: str, kind: str, found: str) -> None:
    """Raise ValueError, on every rank, unless all ranks found the same.

    Args:
        what: the setting that says where to look.
        kind: what was looked for there.
        found: what this rank found, as a person reads it.
    """
    said = gather_objects((found, socket.gethostname()))
    for number, (other, host) in enumerate(said):
        if other != said[0][0]:
            raise ValueError(
                f"{what}: rank {number} on {host} has other {kind} ({other}) than rank 0 on {said[0][1]} "
                f"({said[0][0]}); make the copies alike"
            )


def all_or_none(action: Callable[[], T]) -> list[T]:
    """Run an action on every rank and return all results on every rank, in rank order.

    Raises:
        OSError: on every rank, when the action raised one on any; else the others would wait for ever.
    """
    try:
        outcome: T | OSError = action()
    except OSError as error:
        outcome = OSError(str(error))
    outcomes = gather_objects(outcome)
    for one in outcomes:
        if isinstance(one, OSError):
            raise one
    return outcomes


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over ranks, in place, and return it."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())
