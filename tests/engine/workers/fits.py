"""Train with the real Trainer several times in one launch, since a launch takes longer than a few tiny steps.

Argument: a JSON file {output folder: arguments without --output}, of pretrain.py, or with --task of finetune.py.
"""

import json
import sys
from pathlib import Path

from launch.finetune import parse as parse_finetuning
from simla_ds.engine.build import build
from simla_ds.engine.distributed import finish, start
from simla_ds.engine.finetune import build_finetuning
from simla_ds.engine.trainer import Trainer
from simla_ds.parsing import parse_config


def main() -> None:
    (file,) = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = start()
    try:
        for output, arguments in json.loads(Path(file).read_text()).items():
            tuning = "--task" in arguments
            parse, builder = (parse_finetuning, build_finetuning) if tuning else (parse_config, build)
            config, launch = parse([*arguments, "--output", output])
            Trainer(config, launch.deepspeed, ranks, builder).fit()
    finally:
        finish()


if __name__ == "__main__":
    main()
