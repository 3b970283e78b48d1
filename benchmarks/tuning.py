"""Find faster launch configurations on the card at hand: `python -m benchmarks kernels --tune FILE`.

From the fixed table, one number at a time is halved or doubled for as long as that is faster. A configuration that does
not compile, does not fit the card or changes a result is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from benchmarks.agreement import largest_difference
from simla_kernels.configs import trying
from simla_kernels.launching import LaunchConfig
from simla_kernels.tuned import Configs

GAIN = 0.98
"""Time of a configuration, relative to the best so far, from which it is believed to be faster."""
TOLERANCE = 1e-2
"""Largest change of a result in units of its largest entry: another order of summation, in bf16."""


def tune(run: Callable[[], Sequence[Tensor]], seconds: Callable[[Callable[[], object]], float]) -> Configs:
    """Return the configurations that `run` uses where others than the fixed ones were faster.

    Args:
        run: launches kernels and returns what they made, alike at every call.
        seconds: times a call.

    Raises:
        ValueError: two calls with the fixed configurations differ, so that no other could be seen to be right.
    """
    chosen: Configs = {}
    with trying(chosen):
        wanted = run()
        if not largest_difference(run(), wanted) <= TOLERANCE:
            raise ValueError("two runs with the same configurations differ: fix the seed of what they draw")
        fixed, best = dict(chosen), seconds(run)
        for key in fixed:
            improved = True
            while improved:
                improved = False
                for candidate in neighbours(chosen[key]):
                    before, chosen[key] = chosen[key], candidate
                    taken = _time(run, wanted, seconds)
                    if taken < GAIN * best:
                        best, improved = taken, True
                    else:
                        chosen[key] = before
    return {key: config for key, config in chosen.items() if config != fixed[key]}


def neighbours(config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Yield the configurations that differ in one number: a tile or the warps twice or half as many, a stage more."""
    for name, size in config.tiles.items():
        for other in (size * 2, size // 2):
            if other:
                yield replace(config, tiles={**config.tiles, name: other})
    for warps in (config.num_warps * 2, config.num_warps // 2):
        if 1 <= warps <= 16:
            yield replace(config, num_warps=warps)
    for stages in (config.num_stages + 1, config.num_stages - 1):
        if 1 <= stages <= 4:
            yield replace(config, num_stages=stages)


def _time(
    run: Callable[[], Sequence[Tensor]], wanted: Sequence[Tensor], seconds: Callable[[Callable[[], object]], float]
) -> float:
    try:
        made = run()
        taken = seconds(run)
    except Exception as error:  # a compiler or driver refuses sizes in any way it likes
        print(f"      passed over: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return float("inf")
    return taken if largest_difference(made, wanted) <= TOLERANCE else float("inf")
