"""Statistics over seeds."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.data_efficiency.compare import POWER, by_seed, compare, detectable, estimate, holm

A, B = {0: 11.0, 1: 14.0, 2: 12.5}, {0: 10.0, 1: 12.0, 2: 9.5}  # differences 1, 2 and 3


def row(seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "group": "simla",
        "fraction": 1.0,
        "seed": seed,
        "status": "done",
        "metrics": {"student": {"m": 10.0 + seed}, "teacher": {"m": 20.0}},
        **changes,
    }


def test_a_paired_difference_is_that_of_the_paired_t_test():
    found, known = compare("a", "b", {"a": A, "b": B}), stats.ttest_rel([*A.values()], [*B.values()])
    assert found is not None
    assert found.difference.mean == pytest.approx(2)
    assert found.difference.interval == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert found.difference.p_value == pytest.approx(float(known.pvalue))
    assert found.difference.freedom == 2
    assert str(found) == "a against b: +2.0 (95% interval -0.5 to +4.5, 3 seeds)"


def test_sets_beside_the_two_say_how_much_all_vary():
    c, d = {0: 3.0, 1: 5.0, 2: 2.0}, {0: 7.0, 1: 9.5, 2: 8.0}
    found = compare("a", "b", {"a": A, "b": B, "c": c, "d": d})
    # least squares with an intercept, three sets' and two seeds' effects, and the difference's own variance
    values = np.array([[*of.values()] for of in (A, B, c, d)]).ravel()
    of, seed = np.divmod(np.arange(12), 3)
    design = np.stack([of == of, of == 1, of == 2, of == 3, seed == 1, seed == 2], 1).astype(float)
    solved, rest, _, _ = np.linalg.lstsq(design, values)
    direction = np.array([0, -1, 0, 0, 0, 0])  # set 0 less set 1
    variance = rest[0] / 6 * direction @ np.linalg.inv(design.T @ design) @ direction
    assert found is not None
    assert found.difference.mean == pytest.approx(direction @ solved)
    assert found.difference.error == pytest.approx(math.sqrt(variance))
    assert found.difference.freedom == 6


def test_sets_without_all_seeds_or_with_broken_numbers_do_not_count():
    two = compare("a", "b", {"a": A, "b": B})
    others = {"fewer": {0: 1.0, 1: 9.0}, "broken": {**A, 1: math.nan}}
    assert compare("a", "b", {"a": A, "b": B, **others}) == two


def test_one_seed_and_numbers_that_are_not_finite_tell_nothing():
    one, broken = (compare("a", "b", {"a": A, "b": b}) for b in ({1: 12.0, 7: 0.0}, {**B, 2: math.nan}))
    assert one is not None
    assert broken is not None
    assert one.seeds == (1,)
    assert str(one).endswith("in one seed, without an interval")
    assert (one.difference.p_value, broken.difference.p_value) == (1.0, 1.0)
    assert compare("a", "b", {"a": A, "b": {7: 0.0}}) is None


def test_a_difference_that_never_varies_is_certain_and_none_is_not():
    same = compare("a", "b", {"a": A, "b": {seed: value - 2 for seed, value in A.items()}})
    none = compare("a", "b", {"a": A, "b": A})
    assert same is not None
    assert none is not None
    assert (same.difference.p_value, none.difference.p_value) == (0.0, 1.0)


def test_a_failed_cell_is_in_no_mean():
    rows = [row(0), row(1), {**row(2, status="failed"), "metrics": {"student": {"m": 99.0}}}]
    values = by_seed(rows, "simla", 1.0, "m", "student")
    found = estimate(values)
    assert values == {0: 10.0, 1: 11.0}
    assert found is not None
    assert (found.mean, found.count) == (10.5, 2)
    assert found.error == pytest.approx(0.5)


def test_a_familys_p_values_are_adjusted_step_by_step():
    # 4 x .01; 3 x .013 would be less than the one before it; 2 x .04; 1 x .9
    assert holm([0.04, 0.01, 0.9, 0.013]) == pytest.approx([0.08, 0.04, 0.9, 0.04])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("freedom", [1, 2, 10, 40])  # two seeds of two sets; three; three of six; nearly normal
def test_the_detectable_difference_is_found_as_often_as_its_power_says(freedom: int):
    draws, chance = 20_000, np.random.default_rng(0)
    difference = detectable(2.0, freedom, comparisons=1)
    error = 2.0 * np.sqrt(chance.chisquare(freedom, draws) / freedom)
    t = chance.normal(difference, 2.0, draws) / error
    found = (2 * stats.t.sf(np.abs(t), freedom) < 0.05).mean()
    assert found == pytest.approx(POWER, abs=0.012)  # 4 standard errors of the draws
    assert detectable(2.0, freedom, comparisons=16) > 1.3 * difference
