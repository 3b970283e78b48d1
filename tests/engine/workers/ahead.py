"""One run as a CPU does it; and one that looks a micro-batch ahead, is told to stop by a signal, and is resumed."""

import os
import signal
import sys

from simla_ds.engine.distributed import finish, start
from simla_ds.engine.trainer import Trainer
from simla_ds.parsing import parse_config


class Stopped(Trainer):
    """The last rank gets a SIGTERM after some step."""

    stop_at = 0

    def _optimizer_step(self) -> None:
        super()._optimizer_step()
        if self.step == self.stop_at and self.ranks.rank == self.ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    out, *keys = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = start()
    for name, stop_at in (("plain", 0), ("ahead", 3), ("ahead", 0)):
        config, launch = parse_config([*keys, "--output", f"{out}/{name}", "--resume", "auto"])
        trainer = Stopped(config, launch.deepspeed, ranks)
        trainer.stop_at, trainer.feed.ahead = stop_at, name == "ahead"
        trainer.fit()
    finish()


if __name__ == "__main__":
    main()
