"""Train with the real Trainer several times in one launch, since a launch takes longer than a few tiny steps.

Argument: a JSON file {output folder: arguments of pretrain.py without --output}.
"""

import json
import sys
from pathlib import Path

from simla_ds.engine.distributed import finish, start
from simla_ds.engine.trainer import Trainer
from simla_ds.parsing import parse_config


def main() -> None:
    (file,) = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = start()
    try:
        for output, arguments in json.loads(Path(file).read_text()).items():
            config, launch = parse_config([*arguments, "--output", output])
            Trainer(config, launch.deepspeed, ranks).fit()
    finally:
        finish()


if __name__ == "__main__":
    main()
