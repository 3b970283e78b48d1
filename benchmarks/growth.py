"""How a step's cost grows: `python -m benchmarks growth`.

One setting at a time around a small model: operations (counted, and by formula), bytes saved for backward, seconds; the
exponent of a power law fitted to each. Then a forecast for cards that are not here, computed and not measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cost_model
from benchmarks.command import add_timing, conclude, new_result, parse_timing
from benchmarks.step_contenders import Ours
from benchmarks.step_process import count, count_bytes, warm_up
from benchmarks.step_sizes import SIZES, changed, make_batch
from benchmarks.timing import Clock, environment
from simla_ds.config import Config
from simla_ds.planner.operations import step_operations
from simla_ds.planner.shape import StepShape

BASE: Config = changed(
    SIZES["small"],
    model__vision__width=128,
    model__vision__layers=2,
    model__vision__heads=2,
    model__stream__width=128,
    model__stream__layers=3,
    model__stream__heads=2,
    model__stream__intermediate_size=512,
    model__stream__max_positions=600,
    objectives__itc__queue_size=4096,
    train__batch_size=4,
)
TOKENS = 16
"""Of every caption, unless that is what grows."""


@dataclass(frozen=True)
class Setting:
    """What grows, and how much work it should make."""

    name: str
    values: Sequence[int]
    limit: str
    """The exponents of operations that its parts tend to."""


SETTINGS = (
    Setting("batch", (2, 4, 8), "1"),
    Setting("text length, tokens", (6, 12, 24), "0 (pictures) to 2 (attention among words)"),
    Setting("resolution, px", (128, 192, 256, 384), "2 (rows) to 4 (attention among rows)"),
    Setting("queue", (4096, 16_384, 65_536), "0 (all but ITC) to 1 (ITC)"),
    Setting("depth, layers", (2, 4, 8), "1; 0 for heads"),
    Setting("width", (64, 128, 256), "2 (linear layers), 1 (attention, heads)"),
)


def configured(name: str, value: int) -> tuple[Config, int]:
    """Return the base with one setting changed, and the tokens of each caption."""
    key = name.partition(",")[0]
    if key == "text length":
        return BASE, value
    settings = {
        "batch": {"train__batch_size": value},
        "resolution": {"model__vision__image_size": value},
        "queue": {"objectives__itc__queue_size": value},
        "depth": {"model__vision__layers": value, "model__stream__layers": value},
        "width": {f"model__{part}__width": value for part in ("vision", "stream")}
        | {f"model__{part}__heads": value // 64 for part in ("vision", "stream")}
        | {"model__stream__intermediate_size": 4 * value},
    }
    return changed(BASE, **settings[key]), TOKENS


def measure(config: Config, tokens: int, clock: Clock, repeats: int) -> dict[str, float]:
    """Return operations, bytes and seconds of a step."""
    batch = make_batch(config, tokens=tokens, device=clock.device)
    contender = Ours(config, torch.float32, clock.device)
    counted = count_bytes(contender, batch) | count(contender, batch)
    warm_up(contender, batch)
    times = [clock.time(lambda: contender.step(batch)) for _ in range(repeats)]
    formula = step_operations(config, StepShape.of(batch))
    return {
        "gflop": counted["operations"] / 1e9,
        "gflop_by_formula": formula / 1e9,
        "saved_mb": counted["saved_bytes"] / 1e6,
        "seconds": statistics.median(times),
    }


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return e of the power law y = c x^e that fits best (least squares of the logarithms)."""
    x, y = [math.log(a) for a, _ in points], [math.log(b) for _, b in points]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def grow(settings: Sequence[Setting], clock: Clock, repeats: int) -> list[dict[str, Any]]:
    """Measure every value of every setting; print as it goes."""
    curves = []
    for setting in settings:
        points = []
        for value in setting.values:
            points.append({"value": value, **measure(*configured(setting.name, value), clock, repeats)})
            said = ", ".join(f"{key} {number:.4g}" for key, number in points[-1].items() if key != "value")
            print(f"{setting.name} {value}: {said}", file=sys.stderr, flush=True)
        figures = [key for key in points[0] if key != "value"]
        fitted = {key: exponent([(p["value"], p[key]) for p in points]) for key in figures}
        curves.append({"setting": setting.name, "points": points, "exponents": fitted, "limit": setting.limit})
    return curves


def forecast(pairs: int = 64) -> dict[str, dict[str, float]]:
    """Return, per card, the seconds below which a step of the full model in bf16 cannot get, and pairs per second.

    Computed: peak arithmetic for all products, and for the fused operations the longer of arithmetic and traffic
    (benchmarks.cost_model). No launch, no optimizer, no communication, no data.
    """
    config = changed(SIZES["full"], train__batch_size=pairs)
    total = step_operations(config, StepShape.expected(config, float(cost_model.WORDS))) * cost_model.B / pairs
    fused = sum(work.calls * sum(p.flops for p in work.masked) for work in cost_model.WORK.values())
    result = {}
    for name, card in cost_model.CARDS.items():
        ours = sum(work.calls * cost_model.floor(work.fused, card) for work in cost_model.WORK.values())
        seconds = ours + max(0.0, total - fused) / card.flops
        result[name] = {"seconds": seconds, "pairs_per_second": cost_model.B / seconds}
    return result


def describe(result: dict[str, Any]) -> str:
    """Return what is printed: exponents, then the forecast."""
    head = ("setting", "operations", "by formula", "tends to", "saved bytes", "seconds")
    lines = ["Exponents of fitted power laws", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for curve in result["curves"]:
        e = curve["exponents"]
        cells = [f"{e['gflop']:.2f}", f"{e['gflop_by_formula']:.2f}", curve["limit"]]
        cells += [f"{e['saved_mb']:.2f}", f"{e['seconds']:.2f}"]
        values = [str(point["value"]) for point in curve["points"]]
        lines.append(f"| {curve['setting']} ({', '.join(values)}) | " + " | ".join(cells) + " |")
    lines.append(
        "Computed, not measured: the full model in bf16, 64 pairs, at peak rates, without optimizer and launches"
    )
    for card, at in result["forecast_computed"].items():
        lines.append(
            f"{card}: at least {1e3 * at['seconds']:.0f} ms a step, at most {at['pairs_per_second']:.0f} pairs/s"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="settings whose name contains TEXT")
    add_timing(parser, repeats=3, of="timed steps of each")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parse_timing(parser, argv)
    settings = [setting for setting in SETTINGS if arguments.only in setting.name]
    if not settings:
        parser.error(f"--only {arguments.only!r} fits none of {', '.join(setting.name for setting in SETTINGS)}")
    clock = Clock(arguments.clock, arguments.device)
    curves, where = grow(settings, clock, arguments.repeats), environment(arguments.device)
    result = new_result("growth", where, clock=arguments.clock, curves=curves, forecast_computed=forecast())
    return conclude(result, describe(result), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
