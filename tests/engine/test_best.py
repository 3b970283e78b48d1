"""The best evaluation, and the end of patience."""

import pytest

from simla_ds.config import EvalConfig
from simla_ds.engine.best import Best


def follow(values, patience=2, best=None):
    best = best or Best(EvalConfig(metric="eval/a", patience=patience))
    return best, [best.improves({"eval/a": value, "step": step}) for step, value in enumerate(values)]


def test_only_a_higher_value_is_better_and_patience_counts_evaluations_in_a_row():
    best, improved = follow([1.0, 2.0, 2.0, 3.0, 2.5])
    assert improved == [True, True, False, True, False]
    assert (best.value, best.step, best.stops) == (3.0, 3, False)
    assert best.improves({"eval/a": 3.0, "step": 5}) is False
    assert best.stops


def test_a_resumed_run_stops_where_the_whole_one_does():
    first, _ = follow([3.0, 1.0])
    second = Best(EvalConfig(metric="eval/a", patience=2))
    second.load_state_dict(first.state_dict())
    assert not second.stops
    follow([2.0], best=second)
    assert second.stops
    assert second.value == 3.0


def test_without_a_metric_nothing_is_best_and_nothing_stops():
    best = Best(EvalConfig(patience=1))
    assert not best.improves({"step": 0})
    assert not best.stops


def test_a_metric_that_is_not_measured_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"eval\.metric=eval/a is not measured; choose one of eval/b"):
        Best(EvalConfig(metric="eval/a")).improves({"eval/b": 1.0, "step": 0})
