"""Re-ranking's benchmark: both orders score alike, and what is printed."""

from benchmarks.rerank import CASES, compare, describe


def test_both_orders_score_alike():
    found = compare(1, "cpu", "tiny")
    assert found.keys() == CASES.keys()
    for at in found.values():
        assert at["score_difference"] < 1e-4
    assert found["25 full tokens"]["mean_tokens"] == 25
    assert 13 < found["14 of 30 tokens"]["mean_tokens"] < 15
    assert "times as fast" in describe({"speed": found, "memory": {}})
