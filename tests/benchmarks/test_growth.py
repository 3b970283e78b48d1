"""Exponents and the formula of a step's operations."""

import pytest

from benchmarks import growth
from benchmarks.growth import SETTINGS, configured, exponent, forecast, measure
from benchmarks.timing import Clock


def test_a_power_law_gives_its_exponent():
    assert exponent([(x, 3 * x**1.5) for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS])
def test_the_formula_counts_what_the_counter_counts(name: str):
    setting = next(setting for setting in SETTINGS if setting.name == name)
    measured = measure(*configured(name, setting.values[0]), Clock(), 1)
    assert measured["gflop_by_formula"] == pytest.approx(measured["gflop"], rel=0.05)


def test_every_setting_changes_what_it_names():
    for setting in SETTINGS:
        assert len({repr(configured(setting.name, value)) for value in setting.values}) == len(setting.values)


def test_a_newer_card_is_forecast_faster():
    cards = forecast()
    assert 0 < cards["H100"]["seconds"] < cards["A100"]["seconds"]


def test_an_unknown_setting_is_refused():
    with pytest.raises(SystemExit):
        growth.main(["--only", "nothing of the kind"])
