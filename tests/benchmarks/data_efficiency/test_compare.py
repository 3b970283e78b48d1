"""Statistics over seeds, and which rows they are made of."""

from typing import Any

import pytest
from scipy import stats

from benchmarks.data_efficiency.compare import by_seed, comparable, compare, estimate, pairs_needed

A, B = {0: 11.0, 1: 14.0, 2: 12.5}, {0: 10.0, 1: 12.0, 2: 9.5}  # differences 1, 2 and 3


def row(seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "cell": f"simla-1-{seed}",
        "group": "simla",
        "fraction": 1.0,
        "seed": seed,
        "status": "done",
        "metrics": {"student": {"m": 10.0 + seed}, "teacher": {"m": 20.0}},
        "code_hash": "code",
        "grid_hash": "grid",
        "data_hash": "data",
        "config_hash": f"config{seed}",
        "date": "2026-01-01",
        **changes,
    }


def test_a_paired_difference_is_that_of_the_paired_t_test():
    found, known = compare("a", "b", A, B), stats.ttest_rel([*A.values()], [*B.values()])
    assert found is not None
    assert found.difference == pytest.approx(2)
    assert found.interval == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert found.significant == (known.pvalue < 0.05)
    assert not found.significant  # the interval is -0.48 to 4.48
    assert str(found).endswith("3 seeds, detectable 3.1): not significant")


def test_a_difference_that_hardly_varies_is_significant_either_way():
    near = {seed: value - 2 + 0.1 * seed for seed, value in A.items()}
    up, down = compare("a", "b", A, near), compare("b", "a", near, A)
    assert up is not None
    assert down is not None
    assert up.significant
    assert down.significant
    assert str(up).endswith("): significant")


def test_unpaired_seeds_are_left_out_and_one_seed_says_nothing_of_significance():
    found = compare("a", "b", A, {1: 12.0, 7: 0.0})
    assert found is not None
    assert found.seeds == (1,)
    assert not found.significant
    assert "nothing can be said" in str(found)
    assert compare("a", "b", A, {7: 0.0}) is None


def test_a_failed_cell_is_in_no_mean():
    rows = [row(0), row(1), {**row(2, status="failed"), "metrics": {"student": {"m": 99.0}}}]
    values = by_seed(rows, "simla", 1.0, "m", "student")
    found = estimate(values)
    assert values == {0: 10.0, 1: 11.0}
    assert found is not None
    assert (found.mean, found.count) == (10.5, 2)
    assert found.error == pytest.approx(0.5)


def test_rows_of_other_code_configuration_or_data_are_left_out_and_named():
    rows = [row(0), row(1), row(2, code_hash="older"), row(3, grid_hash="other"), row(4, data_hash="others")]
    taken, remarks = comparable(rows, "grid")
    assert [one["seed"] for one in taken] == [0, 1]
    assert len(remarks) == 3
    assert any("code older" in remark for remark in remarks)
    assert [one["seed"] for one in comparable(rows, "grid", "older")[0]] == [2]
    with pytest.raises(ValueError, match="no rows of configuration none"):
        comparable(rows, "none")


def test_of_two_rows_of_a_cell_the_newer_counts_and_the_older_is_named():
    taken, remarks = comparable([row(0), row(0, config_hash="edited", date="2026-01-02")], "grid")
    assert [one["config_hash"] for one in taken] == ["edited"]
    assert "config0" in remarks[0]


def test_pairs_needed_are_read_off_on_a_logarithmic_axis():
    curve = [(100, 2.0), (10_000, 6.0), (1000, 4.0)]
    assert pairs_needed(curve, 3.0) == pytest.approx(100 * 10**0.5)
    assert pairs_needed(curve, 6.0) == pytest.approx(10_000)
    assert pairs_needed(curve, 1.0) == 100
    assert pairs_needed(curve, 6.1) is None
    assert pairs_needed([(100, 5.0), (1000, 3.0), (10_000, 5.5)], 5.2) == pytest.approx(10_000 * 0.1 ** (0.3 / 2.5))
