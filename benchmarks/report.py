"""What was stored, over time: `python -m benchmarks report`.

Reads the results of `step`, `growth` and `data` with `--json` in a folder, prints their history, compares the newest of
each kind (size, precision, clock, machine, threads, torch) with the best before it, and draws them. Exit status 1 when
something got worse, is no longer measured, or was measured against a baseline that must not be quoted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WATCHED = {
    "ratio_vs_official_order": (+1, 0.10),
    "useful_share_of_gemm": (+1, 0.10),
    "saved_bytes": (-1, 0.01),
    "saved_bytes_checkpointed": (-1, 0.01),
    "peak_memory_mb": (-1, 0.05),
}
WATCHED_DATA = {
    "ratio_vs_pil_torchvision": (+1, 0.15),
    "ratio_vs_webdataset": (+1, 0.15),
    "ratio_with_randaugment": (+1, 0.15),
    "share_of_scaled_decode": (+1, 0.15),
}
"""Figure -> (+1: more is better, -1: less is; by what share it may be worse before that is a regression). Timings are
ratios within one run, and still noisy; bytes are exact."""
COLUMNS = (*WATCHED, "ratio_vs_flava")
COLUMNS_DATA = ("bits_per_pixel", *WATCHED_DATA)
Kind = tuple[str, ...]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the stored results in a folder, oldest first. ValueError for a file that is no JSON."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); remove it or store it again") from None
        if isinstance(content, dict) and content.get("benchmark") in ("step", "growth", "data"):
            found.append(content)
    return sorted(found, key=lambda result: result["date"])


def by_kind(results: Sequence[dict[str, Any]]) -> dict[Kind, list[dict[str, Any]]]:
    """Group step results that may be compared with each other."""
    groups: dict[Kind, list[dict[str, Any]]] = {}
    for result in results:
        if result["benchmark"] == "step":
            kind = (result["config"], result["precision"], f"{result['clock']} clock", *_where(result))
            groups.setdefault(kind, []).append(result)
    return groups


def data_by_kind(results: Sequence[dict[str, Any]]) -> dict[Kind, list[dict[str, Any]]]:
    """Group what was found for each kind of pictures, likewise."""
    groups: dict[Kind, list[dict[str, Any]]] = {}
    for result in results:
        if result["benchmark"] == "data":
            for pictures, found in result["pictures"].items():
                kind = ("data", pictures, *_where(result))
                shared = {name: result[name] for name in ("date", "environment")}
                groups.setdefault(kind, []).append({**shared, **found})
    return groups


def _where(result: dict[str, Any]) -> Kind:
    """Return what a timing depends on beside the code: another of these, another history."""
    where = result["environment"]
    return where["processor"], where["device"], f"{where['threads']} thread(s)", f"torch {where['torch']}"


def regressions(history: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the newest result of a kind has worse than the best before it: many small steps back are a large one."""
    *before, now = history
    found = list(now.get("objections", []))
    for name, (better, slack) in (WATCHED | WATCHED_DATA).items():
        measured = [result for result in before if result.get(name) is not None]
        if not measured:
            continue
        best, new = max(measured, key=lambda result: better * result[name]), now.get(name)
        if new is None:
            found.append(f"{name} was {best[name]:.4g} ({_commit(best)}), is not measured ({_commit(now)})")
        elif better * (new - best[name]) < -slack * best[name]:
            found.append(f"{name} was {best[name]:.4g} ({_commit(best)}), is {new:.4g} ({_commit(now)})")
    return found


def table(history: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return Markdown: a line per result."""
    head = ("date", "commit", *columns)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in history:
        values = [result["date"], _commit(result), *(result.get(name) for name in columns)]
        lines.append("| " + " | ".join(_text(value) for value in values) + " |")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Write a PNG: step times and bytes of each kind's newest result, its ratios over time, how cost grows."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = by_kind(results)
    growth = next((result for result in reversed(results) if result["benchmark"] == "growth"), None)
    rows = len(groups) + (growth is not None)
    figure, axes = plt.subplots(rows, 3, figsize=(15, 4 * rows), layout="constrained", squeeze=False)
    for row, (kind, history) in zip(axes, groups.items(), strict=False):
        newest = history[-1]
        times = {name: c["median_seconds"] for name, c in newest.get("contenders", {}).items()}
        _bars(row[0], times, f"{', '.join(kind[:3])}: seconds a step")
        saved = {**newest["saved_bytes_of"], "ours, checkpointed": newest["saved_bytes_checkpointed"]}
        _bars(row[1], {name: value / 1e6 for name, value in saved.items()}, "saved for backward, MB")
        for name in ("ratio_vs_official_order", "ratio_vs_flava", "useful_share_of_gemm"):
            points = [(r["date"], r[name]) for r in history if r.get(name) is not None]
            row[2].plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        row[2].set_title("over time")
        row[2].legend(fontsize=8)
    if growth is not None:
        _curves(axes[-1], growth["curves"])
    figure.savefig(out, dpi=90)
    plt.close(figure)


def _bars(axis: Any, values: dict[str, float], title: str) -> None:
    axis.barh(list(values), list(values.values()), color="#3182bd")
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)
    axis.tick_params(axis="y", labelsize=7)


def _curves(row: Any, curves: Sequence[dict[str, Any]]) -> None:
    for axis, figure in zip(row, ("gflop", "saved_mb", "seconds"), strict=True):
        for curve in curves:
            first = curve["points"][0]
            values = [(p["value"] / first["value"], p[figure] / first[figure]) for p in curve["points"]]
            axis.loglog([x for x, _ in values], [y for _, y in values], marker=".", label=curve["setting"])
        axis.set_title(f"growth of {figure}", fontsize=10)
        axis.set_xlabel("times the smallest setting")
        axis.legend(fontsize=7)


def _commit(result: dict[str, Any]) -> str:
    return result["environment"]["commit"]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Print the history, flag what got worse, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS.name}/ here")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the history there (needs matplotlib)")
    arguments = parser.parse_args(argv)
    try:
        results = read_results(arguments.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not results:
        print(f"{arguments.results} holds no result of `step`, `growth` or `data` with --json", file=sys.stderr)
        return 2
    worse = []
    for kind, history in (by_kind(results) | data_by_kind(results)).items():
        print(f"{', '.join(kind)}\n{table(history, COLUMNS_DATA if kind[0] == 'data' else COLUMNS)}\n")
        worse += [f"REGRESSION {', '.join(kind)}: {line}" for line in regressions(history)]
    if arguments.plot:
        draw(results, arguments.plot)
    print("\n".join(worse) or "nothing got worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
