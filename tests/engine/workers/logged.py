"""launch/pretrain.py, but every rank writes down which samples it trained on: OUTPUT/samples_rank0.jsonl ..."""

import json
import sys
from pathlib import Path

from launch import pretrain
from simla_ds.engine import trainer


class LoggedTrainer(trainer.Trainer):
    def _next_batches(self):
        batches = super()._next_batches()
        ids = [number for batch in batches for number in batch["sample_id"].tolist()]
        path = Path(self.config.output, f"samples_rank{self.ranks.rank}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"step": self.step, "ranks": self.ranks.world_size, "ids": ids}) + "\n")
        return batches


if __name__ == "__main__":
    trainer.Trainer = LoggedTrainer
    sys.exit(pretrain.main())
