"""Which rows may be compared with each other: those that agree. The others are named, never averaged with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from benchmarks.data_efficiency.identity import config_hash
from benchmarks.data_efficiency.rows import DONE, Row


def comparable(
    rows: Sequence[Row], grid_hash: str, code: str = "", recipes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> tuple[list[Row], list[str]]:
    """Return the rows that may be compared with each other, and a line for whatever is left out.

    They are of one shared configuration, one code and the same data, and were run alike (execution). A group has one
    configuration at a fraction, whatever the seed. Of several rows of a cell the newest counts. Where rows disagree,
    those win of which most are finished, then the newest.

    Args:
        grid_hash: shared configuration to take (Grid.shared_hash).
        code: code hash to take; empty: the one with most finished rows.
        recipes: what the grid says now of each cell's configuration, by the cell's name; rows of another are left out.

    Raises ValueError when there is no such row.
    """
    fitting = [row for row in rows if row["grid_hash"] == grid_hash and code in ("", row["code_hash"])]
    if not fitting:
        there = ", ".join(dict.fromkeys(f"{row['grid_hash']} (code {row['code_hash']})" for row in rows))
        raise ValueError(
            f"no rows of configuration {grid_hash}{code and f' and code {code}'}; there are rows of "
            f"{there or 'none at all'}"
        )
    kept = _agreeing(fitting, _origin)
    others = [row for row in rows if _origin(row) != _origin(kept[0])]
    remarks = [
        f"{sum(_origin(row) == key for row in others)} row(s) of configuration {key[0]}, code {key[1]}, data {key[2]} "
        "left out"
        for key in dict.fromkeys(map(_origin, others))
    ]
    done, failed = ([row for row in kept if (row["status"] == DONE) == wanted] for wanted in (True, False))
    contradicted = [(row, _contradiction(row["config"], recipes.get(row["cell"], {}))) for row in done]
    remarks += [f"{row['cell']}: {found}: left out" for row, found in contradicted if found]
    done = [row for row, found in contradicted if not found]
    if done:
        done, found = _run_alike(done)
        remarks += found
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in done:
        cells.setdefault((row["group"], row["fraction"]), []).append(row)
    for of in cells.values():
        same = _agreeing(of, _tuning)
        remarks += [_otherwise(row, same[0]) for row in of if _tuning(row) != _tuning(same[0])]
        done = [row for row in done if row not in of or row in same]
    newest: dict[str, Row] = {}
    for row in sorted([*failed, *done], key=lambda row: row["date"]):
        if row["cell"] in newest:
            remarks.append(f"{row['cell']}: an older row ({newest[row['cell']]['config_hash']}) left out")
        newest[row["cell"]] = row
    return list(newest.values()), remarks


def execution(row: Row) -> tuple[str, str, int]:
    """Return the kind of device that a row's cell was trained on, in which precision, and the pairs of a step.

    Rows from before the precision was recorded have the one that was asked for; "auto" depends on the processor.
    """
    if found := row.get("execution"):
        return found["device"], found["precision"], found["global_batch"]
    machine, train = row["environment"], row["config"]["train"]
    precision = (
        f"auto (what {machine['processor']} makes of it)" if train["precision"] == "auto" else train["precision"]
    )
    batch = train["batch_size"] * train["grad_accumulation"] * machine["ranks"]
    return "cpu" if machine["device"] == "cpu" else "cuda", precision, batch


def _agreeing(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """Return the rows of the key with most finished ones, then with the newest."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return max(groups.values(), key=lambda of: (sum(r["status"] == DONE for r in of), max(r["date"] for r in of)))


def _origin(row: Row) -> tuple[str, str, str]:
    return row["grid_hash"], row["code_hash"], row["data_hash"]


def _contradiction(config: Mapping[str, Any], recipe: Mapping[str, Any], name: str = "") -> str:
    """Return in what a row's configuration differs from what its cell's recipe sets; empty: in nothing."""
    for key, value in recipe.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            if found := _contradiction(config.get(key, {}), value, path):
                return found
        elif key in config and config[key] != (list(value) if isinstance(value, tuple) else value):
            return f"{path} {config[key]}, where the grid says {value}"
    return ""


def _run_alike(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    kept = _agreeing(rows, execution)
    others = [row for row in rows if execution(row) != execution(kept[0])]
    said = "{} in precision {}, {} pairs a step"
    return kept, [
        f"{row['cell']}: run on {said.format(*execution(row))}, not {said.format(*execution(kept[0]))}: left out"
        for row in others
    ]


def _tuning(row: Row) -> str:
    """Return a row's own configuration as a hash, whatever its seed."""
    return config_hash(_seedless(row))


def _seedless(row: Row) -> dict[str, Any]:
    config = row["config"]
    return {**config, "train": {name: value for name, value in config["train"].items() if name != "seed"}}


def _otherwise(row: Row, kept: Row) -> str:
    name, value, usual = next(_differences(_seedless(row), _seedless(kept), ""))
    return f"{row['cell']}: {name} {value}, where the others of {row['group']} have {usual}: left out"


def _differences(one: Any, other: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other
