"""Pretrain SIMLA: `deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json [--config RECIPE] [--KEY VALUE ...]`.

Exit status: 0 done, 2 wrong use or bad input (one line says what to change), 1 failed.
"""

import sys

from simla_ds.threads import set_threads

set_threads()  # before torch is imported

from simla_ds.parsing import parse_config  # noqa: E402  the thread count must be set first


def main() -> int:
    """Parse, build, train."""
    config, launch = parse_config(sys.argv[1:])
    from simla_ds.engine.run import run

    return run("pretrain.py", config, launch.deepspeed)


if __name__ == "__main__":
    sys.exit(main())
