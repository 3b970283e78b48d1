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
    from simla_ds.data.loader import StalledData
    from simla_ds.engine.distributed import finish, start
    from simla_ds.engine.faults import lost_peer
    from simla_ds.engine.trainer import Trainer

    ranks = start()
    try:
        Trainer(config, launch.deepspeed, ranks).fit()
    except (ValueError, OSError) as error:
        ranks.say(f"pretrain.py: error: {error}")
        return 2
    except FloatingPointError as error:
        ranks.say(f"pretrain.py: stopped: {error}")
        return 1
    except StalledData as error:
        print(f"pretrain.py: stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        print(
            f"pretrain.py: stopped: rank {ranks.rank} lost another rank; --resume auto goes on from the newest "
            f"checkpoint ({str(error).splitlines()[0]})",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
