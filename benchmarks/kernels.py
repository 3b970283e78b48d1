"""The fused operations against what they replace: `python -m benchmarks kernels`.

Attention against eager and SDPA, the loss heads and the contrast against the published order (logits at all positions,
full softmaxes), LayerNorm against eager. On a card (`--device cuda`) every operation with Triton kernels, and also
against PyTorch's best: SDPA's flash, efficient and cuDNN backends, FlexAttention, varlen_attn, F.linear_cross_entropy.
Forward and backward, in turns; exit status 1 when contenders do not compute the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import cost_model
from benchmarks.agreement import largest_difference, objection
from benchmarks.command import add_timing, conclude, new_result, parse_timing
from benchmarks.compilation import README, write_section
from benchmarks.kernel_cases import Case, Run, cases
from benchmarks.peak_memory import peak_growth_mib
from benchmarks.timing import Clock, alternate, environment, machine, on_card
from benchmarks.tuning import tune
from simla_kernels import dispatch, tuned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest difference of contenders' results and gradients, in units of the largest entry: orders of rounding differ."""
MEMORY = ("ours", "masked, unfused", "official order")
"""Contenders of the XMM head whose memory is compared."""


def measure(clock: Clock, dtypes: list[str], repeats: int, only: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Time every case that contains `only`, printing as it goes; return the rows and what disagreed."""
    rows, objections = [], []
    for dtype in dtypes:
        for name, make in cases(clock.device, DTYPES[dtype]):
            if only in name:
                row, line = measure_case(make(), clock, repeats), f"{dtype:5} {name:58}"
                rows.append({"case": name, "dtype": dtype, **row})
                for other, difference in row["difference"].items():
                    objections += objection(f"{name}, {dtype}: ours and {other}", difference, TOLERANCE[dtype])
                said = ", ".join(f"{key} {value:.2f}x" for key, value in row["ratio"].items())
                print(
                    f"{line} {row['backend']} ours {row['milliseconds']['ours']['median']:9.3f} ms;  {said}", flush=True
                )
    return rows, objections


def measure_case(case: Case, clock: Clock, repeats: int) -> dict[str, Any]:
    """Return the times of a case's contenders, how far their results are from ours, and the backend that was ours."""
    refused = refusing(case.runs)
    wanted = case.checked["ours"]()
    difference = {
        name: largest_difference(run(), wanted)
        for name, run in case.checked.items()
        if name != "ours" and name not in refused
    }
    runs = {name: run for name, run in case.runs.items() if name not in refused}
    times = alternate(runs, repeats, on_card if clock.device.type == "cuda" else clock.time)
    return {
        "backend": dispatch.backend(case.operation, **case.arguments).name,
        "milliseconds": times,
        "ratio": {name: at["median"] / times["ours"]["median"] for name, at in times.items() if name != "ours"},
        "difference": difference,
        "refused": refused,
    }


def refusing(runs: dict[str, Run]) -> dict[str, str]:
    """Run each contender once; return which of the others do not take these sizes, and what they say."""
    found = {}
    for name, run in runs.items():
        try:
            run()
        except RuntimeError as error:
            if name == "ours":
                raise
            found[name] = str(error).splitlines()[0]
            print(f"      {name}: {found[name]}")
    return found


def tune_all(device: torch.device, dtypes: list[str], only: str, path: Path) -> int:
    """Look for faster configurations case by case; store what is found after each."""
    for dtype in dtypes:
        for name, make in cases(device, DTYPES[dtype]):
            if only in name:
                try:
                    found = tune(make().runs["ours"], on_card)
                except ValueError as error:
                    print(f"kernels: error: {name}: {error}", file=sys.stderr)
                    return 1
                tuned.store(path, device, found)
                print(f"{dtype:5} {name:58} {len(found)} faster configuration(s)", flush=True)
    return 0


def table(results: list[dict[str, Any]], memory: dict[str, float], where: dict[str, Any]) -> str:
    """Return Markdown of the measured figures."""
    what = f"{machine(where)}, commit {where['commit']}"
    lines = [
        f"Measured on {what}: milliseconds of forward + backward, medians, in turns.",
        "",
        "| operation | dtype | backend | ours | others / ours |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in r["ratio"].items())
        lines.append(
            f"| {r['case']} | {r['dtype']} | {r['backend']} | {r['milliseconds']['ours']['median']:.2f} | {said} |"
        )
    said = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
    return "\n".join(
        [*lines, "", f"Peak growth of memory, XMM head, fp32, forward + backward, 1,200 masked rows: {said}."]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels", description="The fused operations against what they replace."
    )
    add_timing(parser, repeats=20, of="timed rounds; on a card each of 50 ms a contender")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of inputs (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures")
    parser.add_argument("--write", action="store_true", help="put the tables into kernels/README.md")
    parser.add_argument(
        "--tune", type=Path, metavar="FILE", help=f"on a card: store faster launch configurations, for {tuned.VARIABLE}"
    )
    arguments = parse_timing(parser, argv)
    device, only = arguments.device, arguments.only
    names = [name for name, _ in cases(device, torch.float32)]
    if not any(only in name for name in names):
        parser.error(f"--only {only}: in none of {'; '.join(names)}")
    if only and arguments.write:
        parser.error("--write puts the whole table into kernels/README.md: leave --only out")
    if arguments.tune and device.type != "cuda":
        parser.error("--tune times Triton's kernels and needs a card: --device cuda")
    torch.manual_seed(0)
    if arguments.tune:
        return tune_all(device, arguments.dtype, only, arguments.tune)
    rows, objections = measure(Clock(arguments.clock, device), arguments.dtype, arguments.repeats, only)
    memory = {} if only else {name: peak_growth_mib(name, device) for name in MEMORY}
    said = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
    result = new_result(
        "kernels",
        environment(device),
        clock=arguments.clock,
        results=rows,
        peak_growth_mib=memory,
        objections=objections,
    )
    if arguments.write and not objections:
        write_section(README, "measured", table(rows, memory, result["environment"]))
        write_section(README, "computed", cost_model.table())
    return conclude(result, f"peak growth of memory, XMM head: {said}" if memory else "", arguments.json)
