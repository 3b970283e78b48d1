"""Which rows agree with each other."""

from typing import Any

import pytest

from benchmarks.data_efficiency.comparable import comparable, execution

MACHINE = {"processor": "a CPU", "ranks": 1, "device": "cpu"}


def row(seed: int = 0, rate: float = 0.1, **changes: Any) -> dict[str, Any]:
    train = {"seed": seed, "precision": "auto", "batch_size": 8, "grad_accumulation": 2}
    return {
        "cell": f"simla-1-{seed}",
        "group": "simla",
        "fraction": 1.0,
        "seed": seed,
        "status": "done",
        "code_hash": "code",
        "grid_hash": "grid",
        "data_hash": "data",
        "config_hash": f"config{seed}",
        "config": {"train": train, "optim": {"learning_rate": rate}},
        "environment": MACHINE,
        "date": "2026-01-01",
        **changes,
    }


def seeds(rows: list[dict[str, Any]], code: str = "") -> tuple[list[int], list[str]]:
    taken, remarks = comparable(rows, "grid", code)
    return sorted(one["seed"] for one in taken), remarks


def test_rows_of_other_code_configuration_or_data_are_left_out_and_named():
    rows = [row(0), row(1), row(2, code_hash="older"), row(3, grid_hash="other"), row(4, data_hash="others")]
    taken, remarks = seeds(rows)
    assert taken == [0, 1]
    assert len(remarks) == 3
    assert "1 row(s) of configuration grid, code older, data data left out" in remarks
    assert seeds(rows, "older")[0] == [2]
    with pytest.raises(ValueError, match="no rows of configuration none"):
        comparable(rows, "none")


def test_of_two_rows_of_a_cell_the_newer_counts_and_the_older_is_named():
    taken, remarks = comparable([row(0), row(0, config_hash="again", date="2026-01-02")], "grid")
    assert [one["config_hash"] for one in taken] == ["again"]
    assert remarks == ["simla-1-0: an older row (config0) left out"]


def test_seeds_of_another_tuning_are_not_averaged_with_the_others():
    taken, remarks = seeds([row(0), row(1, rate=0.2, date="2026-01-02"), row(2)])
    assert taken == [0, 2]
    assert remarks == ["simla-1-1: optim.learning_rate 0.2, where the others of simla have 0.1: left out"]
    assert seeds([row(0), row(1, rate=0.2, date="2026-01-02")])[0] == [1]  # as many of either: the newer


def test_sets_and_fractions_may_be_tuned_each_for_itself():
    other = row(0, rate=0.2, group="itc", cell="itc-1-0")
    tenth = row(0, rate=0.3, fraction=0.1, cell="simla-0.1-0")
    assert seeds([row(0), other, tenth]) == ([0, 0, 0], [])


def test_rows_of_a_card_and_of_a_cpu_are_not_compared():
    card = {"device": "cuda", "precision": "bf16", "global_batch": 16}
    cpu = {"device": "cpu", "precision": "fp32", "global_batch": 16}
    rows = [row(0, execution=cpu), row(1, execution=card), row(2, execution=cpu)]
    taken, remarks = seeds(rows)
    assert taken == [0, 2]
    assert remarks[0].startswith("simla-1-1: run on cuda in precision bf16, 16 pairs a step, not cpu in precision fp32")


def test_rows_from_before_the_execution_was_recorded_have_one_all_the_same():
    assert execution(row(0)) == ("cpu", "auto (what a CPU makes of it)", 16)
    assert execution(row(0, environment={**MACHINE, "device": "a card", "ranks": 2})) == (
        "cuda",
        "auto (what a CPU makes of it)",
        32,
    )
    moved = row(1, environment={**MACHINE, "processor": "another"})  # auto may be another precision there
    assert seeds([row(0), moved, row(2)])[0] == [0, 2]


def test_failed_rows_hold_no_configuration_and_stay_known():
    failed = {key: value for key, value in row(1, status="failed").items() if key not in ("config", "environment")}
    assert seeds([row(0), failed]) == ([0, 1], [])


def test_rows_that_contradict_the_grid_as_it_is_now_are_left_out_and_named():
    rows = [row(0, rate=0.1), row(1, rate=0.1), row(2, rate=0.2)]
    recipes = {f"simla-1-{seed}": {"optim": {"learning_rate": 0.2}} for seed in range(3)}
    taken, remarks = comparable(rows, "grid", recipes=recipes)
    assert [one["seed"] for one in taken] == [2]
    assert "simla-1-0: optim.learning_rate 0.1, where the grid says 0.2: left out" in remarks
