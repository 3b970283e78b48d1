"""A training programme, whatever it trains: ranks start, train and leave; what goes wrong is a line and a status."""

from __future__ import annotations

import os
import sys

from simla_ds.config import Config
from simla_ds.data.loader import StalledData
from simla_ds.engine.build import Builder, build
from simla_ds.engine.distributed import Ranks, finish, start
from simla_ds.engine.faults import lost_peer
from simla_ds.engine.trainer import Trainer


def run(program: str, config: Config, deepspeed_json: str | None, build: Builder = build) -> int:
    """Train and return the exit status: 0 done, 2 wrong use or bad input, 1 failed.

    Args:
        program: whose messages they are, such as pretrain.py.
        build: what is trained, pretraining by default.
    """
    try:
        if _reuses_addresses():
            raise ValueError(
                "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun: restarts meet addresses of the dead"
            )
        ranks = start(patience=config.data.timeout)
    except ValueError as error:
        _say_here(f"{program}: error: {error}")
        return 2
    if restart := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        most = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        ranks.say(f"{program}: restart {restart} of at most {most}: a rank was lost or failed, on this node or another")
    try:
        status = _train(program, config, deepspeed_json, ranks, build)
    except BaseException:
        finish(1)
        raise
    finish(status)
    return status


def _train(program: str, config: Config, deepspeed_json: str | None, ranks: Ranks, build: Builder) -> int:
    try:
        Trainer(config, deepspeed_json, ranks, build).fit()
    except (ValueError, OSError) as error:
        ranks.say_first(f"{program}: error: {error}")
        return 2
    except FloatingPointError as error:
        ranks.say_first(f"{program}: stopped: {error}")
        return 1
    except StalledData as error:
        _say_here(f"{program}: stopped: {error}")
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        _say_here(
            f"{program}: stopped: rank {ranks.rank} lost another rank; --resume auto goes on from the newest "
            f"checkpoint ({str(error).splitlines()[0]})"
        )
        return 1
    return 0


def _reuses_addresses() -> bool:
    """Whether torchrun may restart ranks that share one store: further groups find the keys of the start before."""
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shares and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def _say_here(line: str) -> None:
    """Print on this rank, whichever it is: the others may be gone, or know nothing of it."""
    print(line, file=sys.stderr, flush=True)
