"""Pairs needed for a score."""

import pytest

from benchmarks.data_efficiency.needed import pairs_needed, share_needed


def test_pairs_needed_are_read_off_on_a_logarithmic_axis():
    curve = [(100, 2.0), (10_000, 6.0), (1000, 4.0)]
    assert pairs_needed(curve, 3.0) == pytest.approx(100 * 10**0.5)
    assert pairs_needed(curve, 6.0) == pytest.approx(10_000)
    assert pairs_needed(curve, 1.0) == 100
    assert pairs_needed(curve, 6.1) is None
    assert pairs_needed([(100, 5.0), (1000, 3.0), (10_000, 5.5)], 5.2) == pytest.approx(10_000 * 0.1 ** (0.3 / 2.5))


def test_a_share_is_a_mean_over_seeds_with_an_interval_and_one_seed_gives_none():
    theirs = {seed: [(100, 2.0), (1000, 4.0)] for seed in (0, 1, 2)}
    mine = {0: [(100, 3.0), (1000, 5.0)], 1: [(100, 2.0), (1000, 4.0)], 7: [(100, 4.0), (1000, 4.0)]}
    low, high = 10**-0.5, 1.0  # seed 0 is there half way between 100 and 1,000, seed 1 at the end; 7 has no partner
    assert share_needed(mine, theirs).startswith(f"{(low * high) ** 0.5:.2f} (95% ")
    assert share_needed(mine, theirs).endswith(", 2 seeds)")
    assert share_needed({0: mine[0]}, theirs) == "-"


def test_a_score_that_some_seed_never_reaches_has_no_share():
    theirs = {seed: [(100, 2.0), (1000, 4.0)] for seed in (0, 1)}
    assert share_needed({0: theirs[0], 1: [(100, 1.0), (1000, 3.9)]}, theirs) == "not reached in 1 of 2 seeds"
