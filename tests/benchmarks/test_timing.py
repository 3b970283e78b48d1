"""Turns, clocks, and where a figure was measured."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from benchmarks.timing import CPU, Clock, alternate, environment, turns


def test_each_has_every_place_and_every_predecessor_about_as_often():
    names, rounds = ["a", "b", "c"], 600
    found = list(turns(names, rounds))
    assert all(sorted(name for n, name in found if n == number) == names for number in range(rounds))
    places = Counter((name, at % 3) for at, (_, name) in enumerate(found))
    assert all(150 < count < 250 for count in places.values())
    behind = Counter((one, other) for (_, one), (_, other) in pairwise(found) if one != other)
    assert all(200 < count < 330 for count in behind.values())  # by rotation a would follow c each time
    assert found == list(turns(names, rounds))


def test_contenders_are_timed_once_a_round_by_the_clock_that_is_given():
    calls = Counter()

    def two_milliseconds(run: Callable[[], object]) -> float:
        run()
        return 0.002

    contenders = {name: partial(calls.update, [name]) for name in "ab"}
    times = alternate(contenders, 3, two_milliseconds, warmup=1)
    assert calls == {"a": 4, "b": 4}
    assert times["a"] == {"median": 2.0, "fastest": 2.0}


def test_parts_add_up():
    clock = Clock()
    for _ in range(2):
        with clock.part("one"):
            started = clock.seconds()
            while clock.seconds() - started < 0.01:
                pass
    assert 0.02 <= clock.parts["one"] < 0.2


def test_a_figure_is_labelled_with_the_device_it_was_measured_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert environment(CPU)["device"] == "cpu"
    assert environment(torch.device("cuda"))["device"] == environment()["device"] == "a card"
