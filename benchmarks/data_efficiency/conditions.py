"""What the outcome depends on beside the sets, as the rows' own configurations say it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.data_efficiency.comparable import execution
from benchmarks.data_efficiency.rows import Row


def conditions(rows: Sequence[Row], rerank: int) -> list[str]:
    """Return a line for each condition that a reader must know to judge a result. rows: finished, comparable."""
    device, precision, batch = execution(rows[0])
    seen = _several({row["pairs_seen"] for row in rows})
    shares = sorted({row["fraction"] for row in rows})
    passes = {share: _several({row["pairs_seen"] / row["pairs"] for row in _of(rows, share)}) for share in shares}
    queues = {share: _several({_itc(row)["queue_size"] for row in _of(rows, share)}) for share in shares}
    of_data = ", ".join(f"{times} passes over {share:.0%}" for share, times in passes.items())
    queued = ", ".join(f"{size} at {share:.0%}" for share, size in queues.items())
    return [
        f"trained on {device} in precision {precision}, {batch} pairs a step, {seen} pairs in all: {of_data}",
        f"negatives of ITC: the step's own pairs and a queue of {queued}",
        f"soft targets of the teacher: their weight alpha grows with the pairs seen, to {_by_group(rows, _alpha)}",
        f"teacher's momentum: {_by_group(rows, lambda row: str(row['config']['teacher']['momentum']))}",
        f"learning rate: {_by_group(rows, lambda row: str(row['config']['optim']['learning_rate']))}",
        f"ITM orders {rerank} candidates of each query, ITC all",
    ]


def _of(rows: Sequence[Row], fraction: float) -> list[Row]:
    return [row for row in rows if row["fraction"] == fraction]


def _itc(row: Row) -> dict:
    return row["config"]["objectives"]["itc"]


def _alpha(row: Row) -> str:
    objectives = row["config"]["objectives"]
    alpha, ramp = objectives["alpha"], objectives["alpha_ramp_samples"]
    if not ramp or row["pairs_seen"] >= ramp:
        return f"{alpha:g}"
    return f"{alpha * row['pairs_seen'] / ramp:g} at the end, of the {alpha:g} that it would have after {ramp:,} pairs"


def _several(values: set[float]) -> str:
    """Say a number, or the range of several."""
    low, high = (f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}" for value in (
        min(values), max(values)))  # fmt: skip
    return low if low == high else f"{low} to {high}"


def _by_group(rows: Sequence[Row], said: Callable[[Row], str]) -> str:
    """Say what most groups have, and which have something else."""
    values = {row["group"]: said(row) for row in rows}
    usual = max(values.values(), key=list(values.values()).count)
    groups = {value: [name for name, has in values.items() if has == value] for value in values.values()}
    others = [f"{', '.join(names)}: {value}" for value, names in groups.items() if value != usual]
    return usual + (f" ({'; '.join(others)})" if others else "")
