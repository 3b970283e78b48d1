"""The VQA v2 soft accuracy, by the published formula (Antol et al. 2015; the organisers' evaluation).

A prediction scores min(1, matches / 3) against the other nine of ten people, averaged over the ten ways to leave one
out, after both sides' spelling is normalised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ANNOTATORS = 10
"""People who answered each question; an entry with one answer counts as if all had given it."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS.split())}}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll
you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
"""A word that lacks one of its apostrophes, and the word. Those with a capital I match no lower-case answer."""


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy, 0 to 1, of a prediction against the answers of several people (ten in VQA v2)."""
    said = normalise_prediction(prediction)
    given = [plain_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)
    matches = sum(answer == said for answer in given)
    return sum(min(1.0, (matches - (answer == said)) / 3) for answer in given) / len(given)


def normalise_prediction(text: str) -> str:
    """Normalise punctuation, then numbers, articles and contractions."""
    text = plain_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower()
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def plain_punctuation(text: str) -> str:
    """Delete punctuation beside a space, or anywhere in a text with a number like 1,000; else put a space instead."""
    number, found = _BETWEEN_DIGITS.search(text) is not None, text
    for sign in _PUNCTUATION:
        beside = f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if beside or number else " ")
    return _FULL_STOP.sub("", found)


def answer_type(entry: dict[str, Any]) -> str:
    """Return `yes_no`, `number` or `other`: as the entry says, or by its commonest answer."""
    if "answer_type" in entry:
        return str(entry["answer_type"]).replace("/", "_").replace(" ", "_")
    answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    common = max(sorted(set(answers)), key=answers.count).lower()
    if common in ("yes", "no"):
        return "yes_no"
    return "number" if common.isdigit() or common in _NUMBERS else "other"
