"""Fine-tune: `deepspeed launch/finetune.py --task NAME --deepspeed ds_configs/zero2.json --model DIR [--KEY VALUE]`.

`--model DIR` is short for `--init.checkpoint DIR`: a pretrained model folder; without it the task is learnt from
scratch. Exit status: 0 done, 2 wrong use or bad input (the message says what to change), 1 failed.
"""

import sys

from simla_ds.threads import set_threads

set_threads()  # before torch is imported

from simla_ds.downstream.config import FinetuneConfig  # noqa: E402  the thread count must be set first
from simla_ds.parsing import parse_config  # noqa: E402  the same


def main() -> int:
    """Parse, build, train."""
    argv = ["--init.checkpoint" + a[7:] if a.partition("=")[0] == "--model" else a for a in sys.argv[1:]]
    config, launch = parse_config(argv, FinetuneConfig, "finetune.py", "Fine-tune SIMLA for a task.")
    from simla_ds.engine.finetune import build_finetuning
    from simla_ds.engine.run import run

    return run("finetune.py", config, launch.deepspeed, build_finetuning)


if __name__ == "__main__":
    sys.exit(main())
