"""A whole training step against the published order and a peer: `python -m benchmarks step`.

Contenders take turns, each in a process of its own: (a) this project's step, (b) the published arithmetic in the
published order (benchmarks.official_order), in bf16 also under autocast, (c) transformers.FlavaForPreTraining at the
same widths, depths, resolution and batch. Captions are as long as COCO's. Inside a step: forward, backward, AdamW, and
queue and teacher where there are such; outside it: data, visual tokeniser, gradient clipping. On a CPU all of them keep
what they free. Exit status 1 when the orders' losses differ or the baseline is slower than it was published.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import SAME_ARITHMETIC, objection
from benchmarks.command import add_timing, conclude, new_result, parse_timing
from benchmarks.step_contenders import BUILD
from benchmarks.step_process import DTYPES, ContenderProcess
from benchmarks.step_sizes import SIZES
from benchmarks.timing import environment, machine, turns
from simla_kernels.half import has_bf16_units

TOGETHER = ("tiny", "small")
"""Sizes whose contenders all stay in memory; of others one at a time is built, warmed up, timed and ended."""
PUBLISHED = {
    "full": {"official order": (3190.0, 19.8), "FLAVA": (1539.1, 9.98)},
    "small": {"official order": (435.0, 3.54), "FLAVA": (159.7, 1.16)},
}
"""GFLOP (25 tokens) and seconds of the published implementation's step and of FLAVA's, in fp32 on two threads of a
machine (Zen 5) where step_process.PROBE runs at PUBLISHED_RATE."""
PUBLISHED_RATE = 203.0
NOT_TIMED = "this CPU has no bf16 units (AVX512-BF16, AMX): bytes are counted, nothing is timed"
SLOWER_AT_MOST = 1.15
"""A baseline that wastes more than this against the published implementation would be a straw man."""


def run(size: str, precision: str, repeats: int, clock: str, device: torch.device) -> dict[str, Any]:
    """Measure and return everything that is stored."""
    can_time = precision == "fp32" or device.type == "cuda" or has_bf16_units()
    names = [name for name in BUILD if precision == "bf16" or "autocast" not in name]
    result = new_result(
        "step",
        environment(device),
        config=size,
        precision=precision,
        clock=clock,
        inside="forward, backward, AdamW, queue and teacher; not: data, visual tokeniser, gradient clipping",
        allocator="glibc keeps freed memory, for all contenders" if device.type == "cpu" else "",
        note="" if can_time else NOT_TIMED,
        pairs=SIZES[size].train.batch_size,
    )

    def start(name: str) -> ContenderProcess:
        # the published order's weights are fp32 under autocast as well
        of = "fp32" if name.startswith("official order") else precision
        return ContenderProcess(name, size, of, clock, device)

    if not can_time:
        return {**result, **summarise_bytes({name: {"bytes": ask_once(start(name), "bytes")} for name in names})}
    agreement = ContenderProcess("agreement", size, "fp32", clock, device)
    difference = json.loads(agreement.process.communicate()[0])["loss_difference"]
    answers = take_turns(names, start, repeats, together=size in TOGETHER)
    result |= {"loss_difference": difference, **summarise(answers, result["pairs"])}
    if device.type == "cpu" and size in PUBLISHED:  # what was published was measured so
        in_fp32 = PUBLISHED[size] if precision == "fp32" else {"official order": PUBLISHED[size]["official order"]}
        result |= straw_man(result["contenders"], in_fp32)
    return {**result, "objections": objections(result)}


def ask_once(process: ContenderProcess, command: str) -> dict[str, Any]:
    """Return the answer to one command, and end the process."""
    answer = process.ask(command)
    process.close()
    return answer


def take_turns(
    names: list[str], start: Callable[[str], ContenderProcess], repeats: int, *, together: bool
) -> dict[str, dict[str, Any]]:
    """Return each contender's answers by command; to "step", one a round, as a list."""
    processes: dict[str, ContenderProcess] = {}
    answers: dict[str, dict[str, Any]] = {name: {"step": []} for name in names}
    for number, name in turns(names, repeats):
        process = processes.get(name)
        if process is None:
            process = processes[name] = start(name)
            first = () if number else ("bytes", "count")
            answers[name] |= {command: process.ask(command) for command in (*first, "warm up")}
        if number == 0:
            answers[name]["parts"] = process.ask("parts")
        answers[name]["step"].append(process.ask("step"))
        print(f"{number + 1} {name}: {answers[name]['step'][-1]['seconds']:.3g} s", file=sys.stderr, flush=True)
        if not together:
            processes.pop(name).close()
    for process in processes.values():
        process.close()
    return answers


def summarise_bytes(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what is saved for backward, and how many times fewer bytes that is than the published order's in fp32."""
    saved = {name: of["bytes"]["saved_bytes"] for name, of in answers.items()}
    published, checkpointed = saved["official order"], answers["ours"]["bytes"]["saved_bytes_checkpointed"]
    return {
        "saved_bytes": saved["ours"],
        "saved_bytes_checkpointed": checkpointed,
        "saved_bytes_official_order": published,
        "saved_bytes_of": saved,
        "times_fewer_saved_bytes": published / saved["ours"],
        "times_fewer_saved_bytes_checkpointed": published / checkpointed,
    }


def summarise(answers: dict[str, dict[str, Any]], pairs: int) -> dict[str, Any]:
    """Return medians, rates and ratios."""
    contenders = {name: _contender(of, pairs) for name, of in answers.items()}
    ours = contenders["ours"]

    def ratio(name: str) -> float | None:
        return contenders[name]["median_seconds"] / ours["median_seconds"] if name in contenders else None

    return {
        **summarise_bytes(answers),
        "gemm_gflops": ours["gemm_gflops"],
        "contenders": contenders,
        "ratio_vs_official_order": ratio("official order"),
        "ratio_vs_official_order_autocast": ratio("official order, autocast bf16"),
        "ratio_vs_flava": ratio("FLAVA"),
        "useful_share_of_gemm": ours["share_of_gemm"],
        "peak_memory_mb": ours["peak_memory_mb"],
    }


def _contender(answers: dict[str, Any], pairs: int) -> dict[str, Any]:
    timed, gflop = answers["step"], answers["count"]["operations"] / 1e9
    median = statistics.median(step["seconds"] for step in timed)
    rates = [rate for step in timed for rate in step["gemm_gflops"]]  # in the dtype it multiplies in
    gemm = statistics.median(rates)
    return {
        "computes": answers["count"]["computes"],
        "median_seconds": median,
        "fastest_seconds": min(step["seconds"] for step in timed),
        "pairs_per_second": pairs / median,
        "gflop": gflop,
        "gflops": gflop / median,
        "gemm_gflops": gemm,
        "fastest_gemm_gflops": max(rates),
        "share_of_gemm": gflop / median / gemm,
        "peak_memory_mb": max(step["peak_memory_mb"] for step in timed),
        "seconds_by_part": answers["parts"]["seconds_by_part"],
        "seconds": [step["seconds"] for step in timed],
    }


def straw_man(contenders: dict[str, dict[str, Any]], published: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Return how many times slower than published the baseline and the control are, by their shares of the GEMM rate.

    Both as they were published: in fp32, the fastest step, by the rate of a quiet moment, here the fastest fp32 probe
    of the run. The rule holds for the baseline scaled by that rate. FLAVA's code is unchanged: where it too is slower
    than published, the machine is worse than its products tell, and only what is left beyond that is the baseline's.
    It excuses and never accuses: where it is faster (a newer library, say), the baseline is judged as it stands.
    Without the control (in bf16 it runs in bf16) the baseline is told and not judged.
    """
    judged = "FLAVA" in published
    probes = contenders if judged else published  # beside a control in bf16 ours multiplies in bf16, too
    rate = max(contenders[name]["fastest_gemm_gflops"] for name in probes)
    shares = {name: contenders[name]["gflop"] / contenders[name]["fastest_seconds"] / rate for name in published}
    slower = {name: gflop / seconds / PUBLISHED_RATE / shares[name] for name, (gflop, seconds) in published.items()}
    told = {"slower_than_published": slower}
    return told | {"baseline_slower": slower["official order"] / max(1.0, slower["FLAVA"])} if judged else told


def objections(result: dict[str, Any]) -> list[str]:
    """Return why the ratios must not be quoted: the orders disagree, or the baseline is a straw man."""
    found = objection("a loss of ours in official fidelity", result["loss_difference"], SAME_ARITHMETIC)
    if (slower := result.get("baseline_slower", 0.0)) > SLOWER_AT_MOST:
        found.append(f"the baseline is {slower:.2f} times slower than published, {SLOWER_AT_MOST} at most: mend it")
    return found


def describe(result: dict[str, Any]) -> str:
    """Return what is printed."""
    what = f"{result['config']}, {result['precision']}, {result['pairs']} pairs, {result['clock']} clock"
    lines = [f"{what}; {machine(result['environment'])}"]
    if result["note"]:
        lines.append(result["note"])
    for name, c in result.get("contenders", {}).items():
        lines.append(
            f"{name:30} {c['median_seconds']:8.3g} s median {c['fastest_seconds']:8.3g} fastest "
            f"{c['pairs_per_second']:7.2f} pairs/s {c['gflop']:8.1f} GFLOP {c['share_of_gemm']:6.0%} of the GEMM rate "
            f"({c['gemm_gflops']:.0f} GFLOP/s) {c['peak_memory_mb']:7.0f} MB peak"
        )
        parts = ", ".join(f"{part} {seconds:.3g}" for part, seconds in c["seconds_by_part"].items())
        lines.append(f"    a step by its parts: {parts}")
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
    lines += [f"{key}: {result[key]:.3g}" for key in keys if result.get(key) is not None]
    if "loss_difference" in result:
        lines.append(
            f"loss_difference: {result['loss_difference']:.2g} (ours in `official` fidelity, fp32, no dropout, against "
            "the official order; what is timed of ours is `corrected`)"
        )
    if slower := result.get("slower_than_published"):
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in slower.items())
        lines.append(f"share of the GEMM rate, published over here (fastest step and product): {ratios}")
    if "baseline_slower" in result:
        lines.append(
            f"baseline slower than published, beyond FLAVA's unchanged code: {result['baseline_slower']:.2f} times "
            f"({SLOWER_AT_MOST} at most)"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", choices=SIZES, default="small", help="model and batch (default: small)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of ours and FLAVA (default: fp32)")
    add_timing(parser, repeats=5, of="timed steps of each")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parse_timing(parser, argv)
    try:
        result = run(arguments.config, arguments.precision, arguments.repeats, arguments.clock, device=arguments.device)
    except RuntimeError as error:  # its process has said why
        print(error, file=sys.stderr)
        return 1
    return conclude(result, describe(result), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
