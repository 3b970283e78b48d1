"""Find faster launch configurations on the card at hand: `python -m benchmarks kernels --tune FILE`.

From the fixed table, one number at a time is halved or doubled for as long as that is faster. A configuration that does
not compile, does not fit the card or changes a result is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from simla_kernels.configs import trying
from simla_kernels.launching import LaunchConfig
from simla_kernels.tuned import Configs

GAIN = 0.98
"""Time of a configuration, relative to the best so far, from which it is believed to be faster."""
TOLERANCE = 1e-2
"""Largest change of a result in units of its largest entry: another order of summation, in bf16."""


def tune(run: Callable[[], Sequence[Tensor]], milliseconds: Callable[[Callable[[], object]], float]) -> Configs:
    """Return the configurations that `run` uses where others than the fixed ones were faster.

    Args:
        run: launches kernels and returns what they made.
        milliseconds: times a call.
    """
    chosen: Configs = {}
    with trying(chosen):
        wanted = run()
        fixed, best = dict(chosen), milliseconds(run)
        for key in fixed:
            improved = True
            while improved:
                improved = False
                for candidate in neighbours(chosen[key]):
                    before, chosen[key] = chosen[key], candidate
                    taken = _time(run, wanted, milliseconds)
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
    run: Callable[[], Sequence[Tensor]],
    wanted: Sequence[Tensor],
    milliseconds: Callable[[Callable[[], object]], float],
) -> float:
    try:
        made = run()
        taken = milliseconds(run)
    except Exception as error:  # a compiler or driver refuses sizes in any way it likes
        print(f"      passed over: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return float("inf")
    return taken if all(_alike(a, b) for a, b in zip(made, wanted, strict=True)) else float("inf")


def _alike(made: Tensor, wanted: Tensor) -> bool:
    scale = float(wanted.float().abs().max()) if wanted.numel() else 0.0
    return bool(torch.allclose(made.float(), wanted.float(), rtol=0, atol=TOLERANCE * max(scale, 1e-30)))
