"""Re-ranking's benchmark: both orders score alike, and what is printed."""

import pytest
import torch

from benchmarks import rerank
from benchmarks.rerank import CASES, PLAIN_BATCHES, compare, describe
from benchmarks.timing import Clock


def test_both_orders_score_alike():
    found = compare(1, Clock("cpu"), "tiny")
    assert found.keys() == CASES.keys()
    for at in found.values():
        assert at["score_difference"] < 1e-4
        plain = [ms for contender, ms in at["ms_per_pair"].items() if contender != "ours"]
        assert len(plain) == len(PLAIN_BATCHES)
        assert at["plain_ms_per_pair"] == min(plain)  # the baseline at its best
        assert at["times_as_fast"] == at["plain_ms_per_pair"] / at["ours_ms_per_pair"]
    assert found["25 full tokens"]["mean_tokens"] == 25
    assert 13 < found["14 of 30 tokens"]["mean_tokens"] < 15
    assert "times as fast" in describe({"speed": found, "memory": {}})


def test_orders_that_score_differently_are_an_error(monkeypatch, capsys):
    at = {"times_as_fast": 2.0, "plain_ms_per_pair": 2.0, "ours_ms_per_pair": 1.0, "ms_per_pair": {}}
    monkeypatch.setattr(rerank, "compare", lambda *_: {"25 full tokens": {**at, "score_difference": 1e-3}})
    assert rerank.main(["--device", "cpu", "--pictures", "0"]) == 1
    assert "a score of 25 full tokens differs by 0.001" in capsys.readouterr().err


@pytest.mark.gpu
def test_both_orders_score_alike_on_a_card():
    for at in compare(1, Clock("wall", torch.device("cuda")), "tiny").values():
        assert at["score_difference"] < 1e-4
