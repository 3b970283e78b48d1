"""A whole training step against the published order and a peer: `python -m benchmarks step`.

Contenders take turns, each in a process of its own: (a) this project's step, (b) the published arithmetic in the
published order (benchmarks.official_order), in bf16 also under autocast, (c) transformers.FlavaForPreTraining at the
same widths, depths, resolution and batch. Captions are as long as COCO's. Inside a step: forward, backward, AdamW, and
queue and teacher where there are such; outside it: data, visual tokeniser, gradient clipping.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_contenders import BUILD, CLOCKS
from benchmarks.step_process import DTYPES, ContenderProcess
from benchmarks.step_sizes import SIZES
from benchmarks.timing import environment
from simla_kernels.half import has_bf16_units

TOGETHER = ("tiny", "small")
"""Sizes whose contenders all stay in memory; of others one at a time is built, warmed up, timed and ended."""
PUBLISHED = {
    "full": {"official order": (3190.0, 19.8), "FLAVA": (1539.1, 9.98)},
    "small": {"official order": (435.0, 3.54), "FLAVA": (159.7, 1.16)},
}
"""GFLOP (25 tokens) and seconds of the published implementation's step and of FLAVA's, on two threads of a machine
(Zen 5) where step_process.PROBE runs at PUBLISHED_RATE."""
PUBLISHED_RATE = 203.0
NOT_TIMED = "this CPU has no bf16 units (AVX512-BF16, AMX): bytes are counted, nothing is timed"
SLOWER_AT_MOST = 1.15
"""A baseline that wastes more than this against the published implementation would be a straw man."""


def run(size: str, precision: str, repeats: int, clock: str) -> dict[str, Any]:
    """Measure and return everything that is stored."""
    can_time = precision == "fp32" or torch.cuda.is_available() or has_bf16_units()
    names = [name for name in BUILD if precision == "bf16" or "autocast" not in name]
    result: dict[str, Any] = {
        "benchmark": "step",
        "config": size,
        "precision": precision,
        "clock": clock,
        "date": time.strftime("%Y-%m-%dT%H:%M"),
        "environment": environment(),
        "inside": "forward, backward, AdamW, queue and teacher; not: data, visual tokeniser, gradient clipping",
        "note": "" if can_time else NOT_TIMED,
        "pairs": SIZES[size].train.batch_size,
    }
    if not can_time:
        return {**result, **summarise_bytes(ask_each(names, size, precision, clock, ["bytes"]))}
    agreement = ContenderProcess("agreement", size, "fp32", clock)
    difference = json.loads(agreement.process.communicate()[0])["loss_difference"]
    answers = take_turns(names, size, precision, clock, repeats)
    return {**result, "loss_difference": difference, **summarise(answers, size, result["pairs"])}


def precision_of(name: str, precision: str) -> str:
    """Return the dtype of a contender's weights: the published order's are fp32 under autocast as well."""
    return "fp32" if name.startswith("official order") else precision


def ask_each(
    names: list[str], size: str, precision: str, clock: str, commands: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return each contender's answers, one process after the other."""
    answers = {}
    for name in names:
        process = ContenderProcess(name, size, precision_of(name, precision), clock)
        answers[name] = [process.ask(command) for command in commands]
        process.close()
        print(f"{name}: {answers[name][-1]}", file=sys.stderr, flush=True)
    return answers


def take_turns(
    names: list[str], size: str, precision: str, clock: str, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Return each contender's answers: the counts, the bytes, then a timed step a turn."""
    processes: dict[str, ContenderProcess] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            process = processes.pop(name, None) or ContenderProcess(name, size, precision_of(name, precision), clock)
            if turn == 0:
                answers[name] += [process.ask("bytes"), process.ask("count")]
            elif size not in TOGETHER:
                process.ask("step")  # warms up
            answers[name].append(process.ask("step"))
            print(f"{turn + 1} {name}: {answers[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
            if size in TOGETHER:
                processes[name] = process
            else:
                process.close()
    for process in processes.values():
        process.close()
    return answers


def summarise_bytes(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what is saved for backward, and how many times fewer bytes that is than the published order's in fp32."""
    saved = {name: rows[0]["saved_bytes"] for name, rows in answers.items()}
    published, checkpointed = saved["official order"], answers["ours"][0]["saved_bytes_checkpointed"]
    return {
        "saved_bytes": saved["ours"],
        "saved_bytes_checkpointed": checkpointed,
        "saved_bytes_official_order": published,
        "saved_bytes_of": saved,
        "times_fewer_saved_bytes": published / saved["ours"],
        "times_fewer_saved_bytes_checkpointed": published / checkpointed,
    }


def summarise(answers: dict[str, list[dict[str, Any]]], size: str, pairs: int) -> dict[str, Any]:
    """Return medians, rates and ratios."""
    rates = [rate for rows in answers.values() for row in rows[2:] for rate in row["gemm_gflops"]]
    gemm = statistics.median(rates)
    contenders = {name: _contender(rows, gemm, pairs) for name, rows in answers.items()}
    ours = contenders["ours"]

    def ratio(name: str) -> float | None:
        return contenders[name]["median_seconds"] / ours["median_seconds"] if name in contenders else None

    return {
        **summarise_bytes(answers),
        "gemm_gflops": gemm,
        "contenders": contenders,
        "ratio_vs_official_order": ratio("official order"),
        "ratio_vs_official_order_autocast": ratio("official order, autocast bf16"),
        "ratio_vs_flava": ratio("FLAVA"),
        "useful_share_of_gemm": ours["share_of_gemm"],
        "peak_memory_mb": ours["peak_memory_mb"],
        "slower_than_published": {
            name: gflop / seconds / PUBLISHED_RATE / contenders[name]["share_of_gemm"]
            for name, (gflop, seconds) in PUBLISHED.get(size, {}).items()
        },
    }


def _contender(rows: list[dict[str, Any]], gemm: float, pairs: int) -> dict[str, Any]:
    counts, timed = rows[1], rows[2:]
    median = statistics.median(row["seconds"] for row in timed)
    parts = {part: statistics.median(row["parts"].get(part, 0.0) for row in timed) for part in timed[0]["parts"]}
    gflop = counts["operations"] / 1e9
    return {
        "computes": counts["computes"],
        "median_seconds": median,
        "fastest_seconds": min(row["seconds"] for row in timed),
        "pairs_per_second": pairs / median,
        "gflop": gflop,
        "gflops": gflop / median,
        "share_of_gemm": gflop / median / gemm,
        "peak_memory_mb": max(row["peak_memory_mb"] for row in timed),
        "seconds_by_part": parts,
        "seconds": [row["seconds"] for row in timed],
    }


def describe(result: dict[str, Any]) -> str:
    """Return what is printed."""
    where = result["environment"]
    what = f"{result['config']}, {result['precision']}, {result['pairs']} pairs, {result['clock']} clock"
    lines = [f"{what}; {where['processor']}, {where['threads']} thread(s), {where['device']}, torch {where['torch']}"]
    if result["note"]:
        lines.append(result["note"])
    for name, c in result.get("contenders", {}).items():
        lines.append(
            f"{name:30} {c['median_seconds']:8.2f} s median {c['fastest_seconds']:8.2f} fastest "
            f"{c['pairs_per_second']:7.2f} pairs/s {c['gflop']:8.1f} GFLOP {c['share_of_gemm']:6.0%} of the GEMM rate "
            f"{c['peak_memory_mb']:7.0f} MB peak"
        )
        lines.append("    " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in c["seconds_by_part"].items()))
        lines.append(f"    {c['computes']}")
    for name, saved in result["saved_bytes_of"].items():
        lines.append(f"saved for backward: {name:30} {saved / 1e6:7.0f} MB")
    checkpointed, fewer = result["saved_bytes_checkpointed"], result["times_fewer_saved_bytes"]
    lines.append(f"saved for backward: {'ours, activation checkpointing':30} {checkpointed / 1e6:7.0f} MB")
    lines.append(
        f"{fewer:.2f} and {result['times_fewer_saved_bytes_checkpointed']:.1f} times fewer (ours, and checkpointed) "
        "than the official order saves in fp32"
    )
    keys = ("ratio_vs_official_order", "ratio_vs_official_order_autocast", "ratio_vs_flava", "useful_share_of_gemm")
    keys += ("gemm_gflops", "loss_difference")
    lines += [f"{key}: {result[key]:.3g}" for key in keys if result.get(key) is not None]
    if slower := result.get("slower_than_published"):
        baseline, control = slower["official order"], slower["FLAVA"]
        lines.append(
            f"share of the GEMM rate, published over here: official order {baseline:.2f}, FLAVA (unchanged code) "
            f"{control:.2f}; what is left to the baseline: {baseline / control:.2f}"
        )
        if min(baseline, baseline / control) > SLOWER_AT_MOST:
            lines.append(f"the baseline is more than {SLOWER_AT_MOST} times slower than published: mend it first")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", choices=SIZES, default="small", help="model and batch (default: small)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of ours and FLAVA (default: fp32)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps of each (default: 5)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own seconds, for a machine "
                        "that others use as well; with OMP_NUM_THREADS=1 (default: wall)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} must be at least 1")
    if arguments.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error(f"--clock cpu adds up {torch.get_num_threads()} threads' seconds; set OMP_NUM_THREADS=1")
    try:
        result = run(arguments.config, arguments.precision, arguments.repeats, arguments.clock)
    except RuntimeError as error:  # its process has said why
        print(error, file=sys.stderr)
        return 1
    print(describe(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
