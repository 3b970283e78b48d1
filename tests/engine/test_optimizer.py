"""The learning rate's schedule."""

from types import SimpleNamespace
from typing import Any

import pytest

from simla_ds.config import Config, OptimConfig
from simla_ds.engine.optimizer import learning_rate, set_learning_rate

OPTIM = {
    "start_learning_rate": 1e-5,
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
    "warmup_samples": 1000,
    "reference_batch": 32,
}
TOTAL = 5000


def config(**changes):
    return Config(optim=OptimConfig(**{**OPTIM, **changes}))


@pytest.mark.parametrize(
    ("samples_seen", "expected"),
    [
        (0, 1e-5),  # the first step
        (500, 0.5 * (1e-5 + 1e-3)),  # half-way up
        (1000, 1e-3),  # the peak
        (3000, 0.5 * (1e-4 + 1e-3)),  # half-way down
        (TOTAL, 1e-4),
        (2 * TOTAL, 1e-4),  # a resumed run that goes on past its plan
    ],
)
def test_the_schedule_warms_up_and_follows_a_cosine(samples_seen, expected):
    assert learning_rate(config(), samples_seen, TOTAL, 32) == pytest.approx(expected, rel=1e-12)


def test_constant_stays_at_the_peak():
    assert learning_rate(config(schedule="constant"), 4000, TOTAL, 32) == 1e-3


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(config(warmup_samples=0), 0, TOTAL, 32) == 1e-3


def test_a_run_shorter_than_its_warm_up_only_climbs():
    rates = [learning_rate(config(), seen, 800, 32) for seen in range(0, 800, 100)]
    assert rates == sorted(rates)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)])
@pytest.mark.parametrize("samples_seen", [0, 500, 3000])
def test_the_whole_schedule_scales_with_the_batch(rule, factor, samples_seen):
    base = learning_rate(config(scale=rule), samples_seen, TOTAL, 32)
    assert learning_rate(config(scale=rule), samples_seen, TOTAL, 128) == pytest.approx(factor * base, rel=1e-12)


def test_every_group_gets_the_rate():
    groups = [{"lr": 1.0, "weight_decay": 0.1}, {"lr": 1.0, "weight_decay": 0.0}]
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))  # all that is read of it
    set_learning_rate(engine, 0.25)
    assert [group["lr"] for group in groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
