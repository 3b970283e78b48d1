"""launch/pretrain.py, but every rank writes down which samples it trained on: OUTPUT/samples_rank0.jsonl ..."""

import json
import sys
from pathlib import Path

from launch import pretrain
from simla_ds.engine import trainer


class LoggedTrainer(trainer.Trainer):
    def _optimizer_step(self):
        step = self.step
        super()._optimizer_step()  # of one micro-batch
        ids = self.last_batch["sample_id"].tolist()
        path = Path(self.config.output, f"samples_rank{self.ranks.rank}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "ranks": self.ranks.world_size, "ids": ids}) + "\n")


if __name__ == "__main__":
    trainer.Trainer = LoggedTrainer
    sys.exit(pretrain.main())
