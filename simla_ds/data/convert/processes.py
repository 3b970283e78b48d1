"""Work handed to several processes and taken back in order, with a bounded amount on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

CHUNK = 16
"""Rows that a process is handed at a time."""


def in_order(work: Callable[[list[In]], list[Out]], items: Iterable[In], workers: int) -> Generator[Out, None, None]:
    """Yield what `work` makes of the items, in their order, from chunks of them done in `workers` processes.

    At most 2 chunks per process are under way, so memory does not grow with the data. One worker works here.
    """
    items = iter(items)
    chunks = iter(lambda: list(islice(items, CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield from work(chunk)
        return
    # Spawned: a fork would copy whatever threads torch has started
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    waiting: deque[Future[list[Out]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) == 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, most likely for want of memory; start again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _end_with_parent() -> None:
    """Make a worker end when the main process is killed, instead of waiting for work for ever; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
