"""Train a few steps with the real Trainer once per settings file, in one launch; each run in a folder of its own.

Arguments: OUT, a comma-separated list of DeepSpeed files, then keys of pretrain.py.
"""

import sys

from simla_ds.engine.distributed import finish, start
from simla_ds.engine.trainer import Trainer
from simla_ds.parsing import parse_config


def main() -> None:
    out, files, *keys = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = start()
    try:
        for file in files.split(","):
            name = file.rsplit("/", 1)[-1].removesuffix(".json")
            config, launch = parse_config([*keys, "--deepspeed", file, "--output", f"{out}/{name}"])
            Trainer(config, launch.deepspeed, ranks).fit()
    finally:
        finish()


if __name__ == "__main__":
    main()
