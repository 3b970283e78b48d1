"""What each ZeRO stage sends in a step, and what stages and ranks cost: `python -m benchmarks communication`.

One rank and two on this machine's CPU train scenes_tiny, as many pairs each, under all stages in turns. Bytes are
counted where collectives reach c10d, as a ring sends them; beside them stands what `simla plan` computes. Seconds are
medians: all wait for the same machine, and its memory is the network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command import conclude, new_result
from benchmarks.launching import ROOT, launch
from benchmarks.timing import Clock, environment, turns

RANKS = (1, 2)
STAGES = (0, 1, 2, 3)
KINDS = {
    "allreduce_": ("gradients and sums reduced everywhere", 2.0),
    "allreduce_coalesced_": ("gradients and sums reduced everywhere", 2.0),
    "reduce_": ("gradients reduced to their owner", 1.0),
    "_reduce_scatter_base_": ("gradients reduced to their owner", 1.0),
    "reduce_scatter_": ("gradients reduced to their owner", 1.0),
    "reduce_scatter_tensor_coalesced_": ("gradients reduced to their owner", 1.0),
    "_allgather_base_": ("gathered", 1.0),
    "allgather_": ("gathered", 1.0),
    "allgather_into_tensor_coalesced_": ("gathered", 1.0),
    "broadcast_": ("broadcast", 1.0),
}
"""c10d's operators: what they do here, and how often a ring sends (n - 1) / n of the whole."""


class Sent(TorchDispatchMode):
    """Adds up the bytes that a rank sends, by kind of collective."""

    def __init__(self, ranks: int):
        super().__init__()
        self.share = (ranks - 1) / ranks
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, times = KINDS.get(func.overloadpacket.__name__, ("other", 1.0))
            # of what is gathered or scattered the whole is one argument and a part of it another
            self.bytes[kind] += round(times * self.share * max(_nbytes(argument) for argument in args))
        return func(*args, **(kwargs or {}))


def _nbytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_nbytes, argument)) if isinstance(argument, (list, tuple)) else 0


def measure(scenes: str, out: Path, steps: int) -> None:
    """Be one rank: train under every stage in turns; rank 0 writes what was sent and how long steps took."""
    from simla_ds.engine.distributed import finish, start
    from simla_ds.engine.trainer import Trainer
    from simla_ds.parsing import parse_config
    from simla_ds.planner.memory import Zero, count_parameters
    from simla_ds.planner.speed import bytes_sent

    ranks = start()
    keys = ["--config", str(ROOT / "launch/recipes/scenes_tiny.yaml"), "--data.train", scenes, "--data.workers", "0"]
    keys += ["--train.batch_size", "8", "--train.precision", "fp32", "--eval.every", "0", "--train.diagnose_every", "0"]
    files = {stage: ROOT / "ds_configs" / f"zero{stage}.json" for stage in STAGES}
    trainers = {}
    for stage, file in files.items():
        config, given = parse_config([*keys, "--deepspeed", str(file), "--output", f"{out}_{stage}"])
        trainers[stage] = Trainer(config, given.deepspeed, ranks)
        trainers[stage]._optimizer_step()  # allocates, warms up
    found = {}
    for stage, trainer in trainers.items():
        with Sent(ranks.world_size) as sent:
            trainer._optimizer_step()
        parameters = count_parameters(trainer.config.model)
        zero = Zero.of(json.loads(files[stage].read_text()))
        planned = bytes_sent(trainer.config, zero, ranks.world_size, 4, parameters)
        found[stage] = {
            "parameters": parameters.total,
            "sent": dict(sent.bytes),
            "planned": vars(planned),
            "seconds": [],
        }
    clock = Clock("wall", ranks.device)
    for _, name in turns([str(stage) for stage in STAGES], steps):  # in the same order on every rank
        stage = int(name)
        found[stage]["seconds"].append(clock.time(trainers[stage]._optimizer_step))
    if ranks.is_main:
        out.write_text(json.dumps({"environment": environment(ranks.device), "stages": found}))
    for trainer in trainers.values():
        trainer.loader.close()
        trainer.stop.close()
        trainer.metrics.close()
    finish()


def table(found: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Yield Markdown lines; found: by ranks and stage."""
    head = (
        "layout",
        "ranks",
        "sent by a rank and step: counted, MB",
        "by plan, MB",
        "a step, s",
        "of ZeRO-0's pairs/s",
    )
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for ranks, stages in found.items():
        fastest = statistics.median(stages[str(STAGES[0])]["seconds"])
        for stage, one in stages.items():
            parts = ", ".join(f"{kind} {count / 1e6:.2f}" for kind, count in sorted(one["sent"].items()) if count > 5e3)
            planned = ", ".join(f"{kind} {count / 1e6:.2f}" for kind, count in one["planned"].items() if count)
            total, by_plan = (sum(one[what].values()) / 1e6 for what in ("sent", "planned"))
            seconds = statistics.median(one["seconds"])
            yield (
                f"| ZeRO-{stage} | {ranks} | {total:.2f}{': ' * bool(parts)}{parts} | {by_plan:.2f}"
                f"{': ' * bool(planned)}{planned} | {seconds:.3f} | {fastest / seconds:.2f} |"
            )
    one, more = (statistics.median(found[str(ranks)][str(STAGES[0])]["seconds"]) for ranks in RANKS)
    yield f"\nPairs per second of {RANKS[1]} ranks over {RANKS[0]}, ZeRO-0: {RANKS[1] * one / more:.2f}."


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks communication", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=15, metavar="N", help="timed steps of each (default: 15)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1")
    from simla_ds.data.scenes.prepare import prepare_scenes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_scenes(folder / "scenes", train=64, shard_size=20, splits={"val": 8}, workers=1, progress=False)
        found: dict[str, dict[str, Any]] = {}
        where: dict[str, Any] = {}
        for ranks in RANKS:
            out = folder / f"found_{ranks}.json"
            launch("benchmarks.communication", ranks, str(folder / "scenes" / "train"), str(out), str(arguments.steps))
            content = json.loads(out.read_text())
            where, found[str(ranks)] = content["environment"], content["stages"]
    return conclude(new_result("communication", where, stages_by_ranks=found), "\n".join(table(found)), arguments.json)


if __name__ == "__main__":  # a rank
    scenes, out, steps = sys.argv[1:]
    measure(scenes, Path(out), int(steps))
