"""Start training commands one after the other, each in a fork of a process that has imported what they import.

Argument: a JSON file [[programme, argument, ...], ...]. Prints a JSON list of [exit status, what went to stderr].
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import simla_ds.engine.finetune  # noqa: F401  what programmes import when they start training
from launch import finetune, pretrain

PROGRAMMES: dict[str, Callable[[], int]] = {"pretrain.py": pretrain.main, "finetune.py": finetune.main}


def run(command: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            sys.argv, status = command, 1
            try:
                status = PROGRAMMES[command[0]]()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(ended), errors.read()


if __name__ == "__main__":
    print(json.dumps([run(command) for command in json.loads(Path(sys.argv[1]).read_text())]))
