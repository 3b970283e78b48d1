"""Loss curves in bf16 against fp32: `python -m benchmarks precision --work DIR`.

The default recipe (scenes_tiny) by the real training command, the same seeds in each precision: the same start weights
and batches. A precision is within noise when its losses, meaned over the run's last half, do not differ from fp32's by
a paired t-test over the seeds, corrected for the number of losses (Holm). Beside it stands how far fp32's seeds are
from each other. A run that is done by the same code is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.command import conclude, new_result
from benchmarks.data_efficiency.compare import CONFIDENCE, estimate, holm
from benchmarks.data_efficiency.identity import code_hash
from benchmarks.launching import ROOT, launcher
from benchmarks.timing import environment

RECIPE = ROOT / "launch" / "recipes" / "scenes_tiny.yaml"
EXACT = "fp32"
BATCH = 32
"""Pairs of a step, the recipe's."""
LOG_EVERY = 10
"""Steps whose losses are meaned into one point of a curve."""
Curves = dict[str, list[float]]
"""Loss -> its value at each LOG_EVERY steps."""


def train(precision: str, seed: int, steps: int, work: Path, threads: int) -> Curves:
    """Train, unless this was done before, and return the curves. RuntimeError when the training fails."""
    out = work / f"{precision}-{seed}-{steps}-{code_hash()}"
    if not (out / "final").is_dir():
        command = [
            *launcher(1),
            *("launch/pretrain.py", "--deepspeed", "ds_configs/zero1.json", "--config", str(RECIPE)),
            *("--output", str(out), "--resume", "auto", "--data.scenes_dir", str(work / "scenes")),
            *("--train.precision", precision, "--train.seed", str(seed)),
            *("--train.batch_size", str(BATCH), "--train.samples", str(BATCH * steps)),
            *("--train.log_every", str(LOG_EVERY), "--train.diagnose_every", "0", "--eval.every", "0"),
            *("--data.workers", "0", "--train.checkpoint_every", str(max(1, steps // 4))),
        ]
        own = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (work / f"{out.name}.log").open("a", encoding="utf-8") as log:
            status = subprocess.run(command, cwd=ROOT, env=own, stdout=log, stderr=log, check=False).returncode
        if status:
            raise RuntimeError(f"{out.name} ended with status {status}; see {log.name}")
    print(f"{out.name}: done", file=sys.stderr, flush=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [name for name in lines[0] if name == "loss" or name.startswith("loss/")]
    return {name: [line[name] for line in lines if name in line] for name in names}


def compare(curves: Mapping[tuple[str, int], Curves], precision: str) -> dict[str, dict[str, Any]]:
    """Return for each loss how far a precision is from fp32, and how far fp32's seeds are from each other.

    curves: by precision and seed, of two seeds at least.
    """
    seeds = sorted(seed for of, seed in curves if of == precision)
    found = {}
    for name in curves[EXACT, seeds[0]]:
        exact, other = ([_end(curves[of, seed][name]) for seed in seeds] for of in (EXACT, precision))
        differences = {seed: b - a for seed, a, b in zip(seeds, exact, other, strict=True)}
        paired = estimate(differences)
        assert paired is not None
        found[name] = {
            EXACT: statistics.fmean(exact),
            precision: statistics.fmean(other),
            "difference": paired.mean,
            "difference_by_seed": list(differences.values()),
            "deviation_of_seeds": statistics.stdev(exact),
            "p": paired.p_value,
        }
    for of, p in zip(found.values(), holm([of["p"] for of in found.values()]), strict=True):
        of |= {"p": p, "within_noise": p >= 1 - CONFIDENCE}
    return found


def _end(curve: Sequence[float]) -> float:
    return statistics.fmean(curve[len(curve) // 2 :])


def draw(curves: Mapping[tuple[str, int], Curves], out: Path) -> None:
    """Draw each loss: a thin line per seed, a thick one through their mean."""
    from matplotlib.figure import Figure

    names = list(next(iter(curves.values())))
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, precision in enumerate(dict.fromkeys(of for of, _ in curves)):
            of = [curve[name] for (which, _), curve in curves.items() if which == precision]
            steps = [LOG_EVERY * (i + 1) for i in range(len(of[0]))]
            for curve in of:
                axis.plot(steps, curve, color=f"C{number}", linewidth=0.4, alpha=0.5)
            mean = [statistics.fmean(values) for values in zip(*of, strict=True)]
            axis.plot(steps, mean, color=f"C{number}", linewidth=1.4, label=precision)
        axis.set(title=name, xlabel="steps")
    figure.axes[0].legend()
    figure.savefig(out, dpi=110)


def table(found: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    """Return Markdown."""
    lines = [
        f"| loss, last half | {EXACT} | {precision} | difference | seeds' deviation | p (Holm) | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in found.items():
        verdict = "within noise" if of["within_noise"] else "DIFFERENT"
        lines.append(
            f"| {name} | {of[EXACT]:.4f} | {of[precision]:.4f} | {of['difference']:+.4f} | "
            f"{of['deviation_of_seeds']:.4f} | {of['p']:.2g} | {verdict} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, compare, draw; exit status 1 when a loss is outside the noise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks precision", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="runs and scenes, kept for the next try"
    )
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="against fp32 (default: bf16)")
    parser.add_argument("--steps", type=int, default=1000, help=f"of {BATCH} pairs (default: 1000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores (default: 1)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < 2:
        parser.error(f"--seeds {arguments.seeds}: two at least, or there is no noise to compare with")
    if arguments.steps < 2 * LOG_EVERY:
        parser.error(f"--steps {arguments.steps}: {2 * LOG_EVERY} at least")
    from simla_ds.data.scenes.prepare import prepare_scenes

    work, precisions = arguments.work.resolve(), (EXACT, arguments.precision)
    prepare_scenes(work / "scenes", train=20_000)
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)
    runs = [(precision, seed) for seed in arguments.seeds for precision in precisions]
    try:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            trained = pool.map(lambda run: train(run[0], run[1], arguments.steps, work, threads), runs)
            curves = dict(zip(runs, trained, strict=True))  # the first failure cancels what has not begun
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    found = compare(curves, arguments.precision)
    if arguments.plot:
        draw(curves, arguments.plot)
    objections = [
        f"{name} in {arguments.precision} is {of['difference']:+.4f} from {EXACT} (p {of['p']:.2g}), whose seeds "
        f"deviate by {of['deviation_of_seeds']:.4f}"
        for name, of in found.items()
        if not of["within_noise"]
    ]
    result = new_result(
        "precision",
        {**environment(), "threads": threads},
        precision=arguments.precision,
        steps=arguments.steps,
        seeds=arguments.seeds,
        losses=found,
        objections=objections,
    )
    return conclude(result, table(found, arguments.precision), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
