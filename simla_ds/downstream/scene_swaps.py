"""Scenes' captions made false by one change: an attribute, a noun or a relation, replaced by another or swapped.

"swapped" exchanges two of the caption's own words, so that right and wrong captions hold the same words; "replaced"
puts in a word from outside. What is made is false beyond doubt: only things are touched whose name nothing else in the
scene has, colours that nobody mixes up, relations that the scene lists, and nouns on plain backgrounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random

from simla_ds.data.scenes.colours import TARGETS
from simla_ds.data.scenes.kit import kit
from simla_ds.downstream.annotations import Entry
from simla_ds.downstream.scene_records import Scene, told_apart

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "top": "bottom", "bottom": "top"}
TURNED_ROUND = ("left of", "above", "bigger")
"""Claims that are false the other way round."""
SEVERAL_AT_ONCE = re.compile(r"from (left|top) to|right beside|up above|them|on top")
"""Where one direction word cannot be turned by itself."""


@dataclass(frozen=True)
class Said:
    """A noun phrase about one thing, "a large red car": where it stands in the caption, and its parts."""

    thing: int
    start: int
    end: int
    size: str
    colour: str
    name: str


def swaps(scenes: list[Scene], random: Random) -> Iterator[Entry]:
    """Yield each scene's true caption beside each false one that can be made of it, as probes (see probes)."""
    names = sorted({name for scene in scenes for name in scene.single.values() if takes_adjectives(name)})
    for scene in scenes:
        said = phrases(scene)
        for kind, make in KINDS.items():
            false = make(scene, said, names, random)
            if false is not None:
                yield {"images": [scene.key], "captions": [scene.record["caption"], false], "kind": kind}


def phrases(scene: Scene) -> list[Said]:
    """Return the phrases that name one thing, whose name nothing else in the scene has."""
    found = []
    for phrase in scene.record["phrases"]:
        if len(phrase["objects"]) != 1 or phrase["objects"][0] not in scene.single:
            continue
        thing = phrase["objects"][0]
        name, colour = scene.single[thing], scene.record["objects"][thing]["colour"]
        parts = re.fullmatch(
            rf"an? (small |large |big )?({re.escape(colour or '-')} )?{re.escape(name)}", phrase["text"]
        )
        if parts and takes_adjectives(name):
            start, end = phrase["span"]
            found.append(Said(thing, start, end, (parts[1] or "").strip(), (parts[2] or "").strip(), name))
    return found


def _attribute_replaced(scene: Scene, said: list[Said], names: list[str], random: Random) -> str | None:
    coloured = [phrase for phrase in said if phrase.colour]
    if not coloured:
        return None
    phrase = random.choice(coloured)
    others = [colour for colour in sorted(TARGETS) if told_apart(colour, [phrase.colour])]
    return _edited(scene, {phrase: _written(phrase.size, random.choice(others), phrase.name)})


def _attribute_swapped(scene: Scene, said: list[Said], names: list[str], random: Random) -> str | None:
    pairs = _pairs_of_colours(said)
    if not pairs:
        return None
    one, other = random.choice(pairs)
    return _edited(
        scene,
        {one: _written(one.size, other.colour, one.name), other: _written(other.size, one.colour, other.name)},
    )


def _noun_replaced(scene: Scene, said: list[Said], names: list[str], random: Random) -> str | None:
    if not said or not scene.plain:
        return None
    phrase, name = random.choice(said), random.choice(names)
    ids = {concept.name: concept.id for concept in kit().concepts.values()}
    there = [thing["concept"] for thing in scene.record["objects"]]
    if name in scene.names or any(kit().confusable(ids[name], concept) for concept in there):
        return None
    return _edited(scene, {phrase: _written(phrase.size, phrase.colour, name)})


def _noun_swapped(scene: Scene, said: list[Said], names: list[str], random: Random) -> str | None:
    pairs = _pairs_of_colours(said) or _pairs_of_claims(scene, said)
    if not pairs:
        return None
    one, other = random.choice(pairs)
    return _edited(
        scene,
        {one: _written(one.size, one.colour, other.name), other: _written(other.size, other.colour, one.name)},
    )


def _relation_replaced(scene: Scene, said: list[Said], names: list[str], random: Random) -> str | None:
    caption = scene.record["caption"]
    if SEVERAL_AT_ONCE.search(caption):
        return None
    spans = [phrase["span"] for phrase in scene.record["phrases"]]
    words = [
        word
        for word in re.finditer(rf"\b({'|'.join(OPPOSITE)})\b", caption)
        if not any(start <= word.start() < end for start, end in spans)
    ]
    if not words:
        return None
    word = random.choice(words)
    return caption[: word.start()] + OPPOSITE[word[0]] + caption[word.end() :]


def _relation_swapped(scene: Scene, said: list[Said], names: list[str], random: Random) -> str | None:
    pairs = _pairs_of_claims(scene, said)
    if not pairs:
        return None
    one, other = random.choice(pairs)
    caption = scene.record["caption"]
    return _edited(scene, {one: caption[other.start : other.end], other: caption[one.start : one.end]})


KINDS: dict[str, Callable[[Scene, list[Said], list[str], Random], str | None]] = {
    "attribute_replaced": _attribute_replaced,
    "attribute_swapped": _attribute_swapped,
    "noun_replaced": _noun_replaced,
    "noun_swapped": _noun_swapped,
    "relation_replaced": _relation_replaced,
    "relation_swapped": _relation_swapped,
}
"""What is changed, and how; None where the caption gives no occasion."""


def _pairs_of_colours(said: list[Said]) -> list[tuple[Said, Said]]:
    return [(a, b) for a, b in combinations(said, 2) if a.colour and b.colour and told_apart(a.colour, [b.colour])]


def _pairs_of_claims(scene: Scene, said: list[Said]) -> list[tuple[Said, Said]]:
    claimed = {frozenset(claim[1:]) for claim in scene.record["claims"] if claim[0] in TURNED_ROUND}
    return [(a, b) for a, b in combinations(said, 2) if {a.thing, b.thing} in claimed]


def _written(size: str, colour: str, name: str) -> str:
    """Return the noun phrase with its article."""
    words = [word for word in (size, colour, name) if word]
    article = ("an" if words[0] == "orange" else "a") if len(words) > 1 else article_of(name)
    return " ".join([article, *words])


def _edited(scene: Scene, new: dict[Said, str]) -> str:
    text = scene.record["caption"]
    for phrase in sorted(new, key=lambda phrase: -phrase.start):
        text = text[: phrase.start] + new[phrase] + text[phrase.end :]
    return text


def takes_adjectives(name: str) -> bool:
    """Whether "a large red NAME" is English: not of "broccoli", nor of "small airplane"."""
    return article_of(name) != "some" and not name.startswith("small ")


@cache
def article_of(name: str) -> str:
    """Return "a", "an" or "some", as the kit says."""
    return next(concept.article for concept in kit().concepts.values() if concept.name == name)
