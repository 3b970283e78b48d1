"""The published soft accuracy, against arithmetic written out by hand and against its definition."""

from itertools import combinations
from random import Random

import pytest

from simla_ds.downstream.vqa_accuracy import answer_type, normalise_prediction, plain_punctuation, soft_accuracy


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("a  man, the man", "man man"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("well-known , yes", "well known yes"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("3.5", "3.5"),
        ("on\ttop\n", "on top"),
        ("An apple", "apple"),
    ],
)
def test_predictions_are_normalised_as_published(text, normal):
    assert normalise_prediction(text) == normal


def test_references_get_the_punctuation_rule_only():
    assert plain_punctuation("The T-shirt.") == "The T shirt"
    assert soft_accuracy("cat", ["the cat"] * 9 + ["dog"]) == 0  # the reference keeps its article
    assert soft_accuracy("t shirt", ["t-shirt"] * 10) == 0  # ten equal answers stay as they are
    assert soft_accuracy("t shirt", ["t-shirt"] * 9 + ["dog"]) == 1


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_by_the_number_of_people_who_agree(matches, accuracy):
    """With 1 of 10: nine subsets of nine hold it once (1/3 each), one doesn't: 9/3/10 = .3."""
    assert soft_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(accuracy, abs=1e-12)


def test_soft_accuracy_is_the_mean_over_all_nine_of_ten():
    random = Random(0)
    for _ in range(1000):
        given = [random.choice(["cat", "dog", "owl"]) for _ in range(10)]
        subsets = [[given[i] for i in nine] for nine in combinations(range(10), 9)]
        wanted = sum(min(1, sum(answer == "cat" for answer in subset) / 3) for subset in subsets) / 10
        assert soft_accuracy("cat", given) == pytest.approx(wanted, abs=1e-12)


def test_types_are_the_entrys_own_or_follow_from_its_commonest_answer():
    assert answer_type({"answer_type": "yes/no", "answer": "3"}) == "yes_no"
    assert answer_type({"answer": ["2", "2", "two"]}) == "number"
    assert answer_type({"answer": "Yes"}) == "yes_no"
    assert answer_type({"answer": "red"}) == "other"
