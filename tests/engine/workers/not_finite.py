"""Trains with a loss that is not finite at some steps, on one rank, under several stages and precisions in turn.

Arguments: OUT, a comma-separated list of STAGE:PRECISION, the steps, comma-separated, then keys of pretrain.py. Writes
OUT/STAGE-PRECISION.json: by how much each step moved the weights, and how the run ended.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from simla_ds.engine.distributed import finish, start
from simla_ds.engine.trainer import Trainer
from simla_ds.parsing import parse_config
from tests.engine.launching import ROOT


class Sabotaged(Trainer):
    """Notes by how much each step moves the weights, and the teacher."""

    steps: tuple[int, ...] = ()

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.moves: list[float] = []
        self.teacher_moves: list[float] = []

    def _optimizer_step(self) -> None:
        objective: Any = self.task.objectives["mlm"]
        loss, step, rank = type(objective).loss, self.step, self.ranks.rank

        def spoilt(*arguments):
            return loss(objective, *arguments) * (float("nan") if rank == 1 and step in self.steps else 1)

        objective.loss = spoilt
        student, teacher = (copy.deepcopy(shards) for shards in (self.source.shards(), self.teacher.master))
        try:
            super()._optimizer_step()
        finally:
            self.moves.append(largest_move(student, self.source.shards()))
            self.teacher_moves.append(largest_move(teacher, self.teacher.master))


def largest_move(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max(float((value - before[name]).abs().max()) for name, value in after.items())


def main() -> None:
    out, layouts, steps, *keys = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = start()
    Sabotaged.steps = tuple(map(int, steps.split(",")))
    for layout in layouts.split(","):
        stage, precision = layout.split(":")
        folder = Path(out, f"{stage}-{precision}")
        more = ["--output", str(folder), "--train.precision", precision]
        config, launch = parse_config([*keys, "--deepspeed", f"{ROOT}/ds_configs/{stage}.json", *more])
        trainer = Sabotaged(config, launch.deepspeed, ranks)
        try:
            trainer.fit()
            end = "done"
        except FloatingPointError as error:
            end = str(error)
        finite = all(bool(torch.isfinite(value).all()) for value in trainer.teacher.state_dict().values())
        trainer.stop.close()
        if ranks.is_main:
            report = {"moves": trainer.moves, "teacher_moves": trainer.teacher_moves, "end": end, "finite": finite}
            folder.with_suffix(".json").write_text(json.dumps(report))
    finish()


if __name__ == "__main__":
    main()
