"""Fine-tune: `deepspeed launch/finetune.py --task NAME --deepspeed ds_configs/zero2.json --model DIR [--KEY VALUE]`.

`--model DIR` is short for `--init.checkpoint DIR`: a pretrained model folder; without it the task is learnt from
scratch. Exit status: 0 done, 2 wrong use or bad input (the message says what to change), 1 failed.
"""

import sys

from simla_ds.threads import set_threads

set_threads()  # before torch is imported

from simla_ds.downstream.config import FORMATS, FinetuneConfig  # noqa: E402  the thread count must be set first
from simla_ds.parsing import LaunchArguments, parse_config  # noqa: E402  the same


def parse(argv: list[str]) -> tuple[FinetuneConfig, LaunchArguments]:
    """Read the command line; exits with status 2 on wrong use."""
    purpose, short = "Fine-tune SIMLA for a task.", {"--model": "init.checkpoint"}
    return parse_config(argv, FinetuneConfig, "finetune.py", purpose, short=short, notes=FORMATS)


def main() -> int:
    """Parse, build, train."""
    config, launch = parse(sys.argv[1:])
    from simla_ds.engine.finetune import build_finetuning
    from simla_ds.engine.run import run

    return run("finetune.py", config, launch.deepspeed, build_finetuning)


if __name__ == "__main__":
    sys.exit(main())
