"""The tasks on the embedded scenes: questions, pairs and hypotheses whose truth is exact, in the tasks' own formats.

What is said is balanced, so that neither text nor picture alone gives an answer away: a question "is there a dog" comes
with a scene that has one and with one that has none; a statement about two pictures comes with both of their orders; a
hypothesis is entailed, contradicted and left open equally often in each family of words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from random import Random

from simla_ds.data.scenes.captions import NUMBERS
from simla_ds.data.scenes.colours import TARGETS
from simla_ds.data.scenes.relations import places
from simla_ds.downstream.annotations import Annotations, Entry
from simla_ds.downstream.scene_records import Scene, read_scenes
from simla_ds.downstream.scene_swaps import OPPOSITE, swaps

AXES = {"left of": ("left of", "right of"), "above": ("above", "below")}
"""A relation that scenes list, and the words for it and for its opposite."""


def scene_annotations(task: str, shards: str, *, limit: int = 0, seed: int = 0) -> Annotations:
    """Make a task's entries out of scenes' shards (as data.train); the same arguments give the same entries.

    limit: scenes used, 0: all. Raises ValueError when the shards hold no scenes, or too few to ask about.
    """
    scenes, pictures = read_scenes(shards, limit)
    entries = list(MAKERS[task](scenes, Random(f"{seed}/{task}")))
    if not entries:
        raise ValueError(f"{len(scenes)} scenes of {shards} make no example for {task}; give 24 or more")
    return Annotations(f"{task} on {len(scenes)} scenes of {shards}", entries, pictures)


def captions(scenes: list[Scene], random: Random) -> Iterator[Entry]:
    """Each scene with its caption."""
    for scene in scenes:
        yield {"image": scene.key, "caption": scene.record["caption"], "image_id": scene.key}


def expressions(scenes: list[Scene], random: Random) -> Iterator[Entry]:
    """What captions call single things by name, with their boxes; all things' boxes are the proposals."""
    for scene in scenes:
        size, things = scene.record["size"], scene.record["objects"]
        for phrase in scene.record["phrases"]:
            named = len(phrase["objects"]) == 1 and things[phrase["objects"][0]]["name"] in phrase["text"]
            if named and len(things) > 1:  # "one other thing" could be any
                yield {
                    "image": scene.key,
                    "text": phrase["text"],
                    "box": phrase["box"],
                    "size": [size, size],
                    "proposals": [thing["box"] for thing in things],
                }


def questions(scenes: list[Scene], random: Random) -> Iterator[Entry]:
    """Questions of seven kinds, at most as many of a kind as there are half as many scenes."""
    most = 12 * (len(scenes) // 24)  # whole groups of 2, 3 and 4
    asked = [(kind, *item) for kind, make in QUESTIONS.items() for item in islice(make(scenes, random), most)]
    for number, (kind, scene, question, answer) in enumerate(random.sample(asked, len(asked))):
        yield {
            "image": scene.key,
            "question": question,
            "question_id": number,
            "question_type": kind,
            "answer": answer,
        }


def _existence(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    return _is_there(_differing(scenes, random), "{}")


def _presence(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    return _is_there(_coloured_apart(scenes, random), "{} thing")


def _is_there(pairs: Iterator[tuple[Scene, Scene, str, str]], named: str) -> Iterator[tuple[Scene, str, str]]:
    """Ask both scenes for what only the one has, and for what only the other has."""
    for one, other, mine, theirs in pairs:
        for asked, answers in ((mine, ("yes", "no")), (theirs, ("no", "yes"))):
            for scene, answer in zip((one, other), answers, strict=True):
                yield scene, f"is there {_a(named.format(asked))} in the picture?", answer


def _position(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    for scene in scenes:
        found = [r for r in scene.record["relations"] if r[0] in AXES and {r[1], r[2]} <= scene.single.keys()]
        if not found:
            continue
        relation, i, j = random.choice(found)
        first, second = scene.single[i], scene.single[j]
        words, turned, true = AXES[relation], random.random() < 0.5, random.random() < 0.5
        if turned:
            first, second, words = second, first, words[::-1]
        yield scene, f"is the {first} {words[not true]} the {second}?", "yes" if true else "no"


def _colour(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    for scene in scenes:
        turned = [i for i in scene.single if scene.record["objects"][i]["turned"]]  # others' colours can be guessed
        if turned:
            thing = scene.record["objects"][random.choice(turned)]
            yield scene, f"what colour is the {thing['name']}?", thing["colour"]


def _background(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    for scene in scenes:
        if scene.plain:
            yield scene, "what colour is the background?", scene.record["background"]["colour"]


def _place(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    """Ask for the colour of the only thing in a part of the picture."""
    for scene in scenes:
        things = scene.record["objects"]
        found = []
        for word in ("left", "right", "top", "bottom"):
            there = [thing for thing in things if word in places(thing["box"], scene.record["size"])]
            elsewhere = [thing for thing in things if OPPOSITE[word] in places(thing["box"], scene.record["size"])]
            if len(there) == 1 and len(elsewhere) == len(things) - 1 and there[0]["colour"]:
                found.append((word, there[0]["colour"]))
        if found:
            word, colour = random.choice(found)
            where = f"on the {word}" if word in ("left", "right") else f"at the {word}"
            yield scene, f"what colour is the thing {where}?", colour


def _count(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, str, str]]:
    by_count: dict[int, list[Scene]] = defaultdict(list)
    for scene in scenes:
        if scene.plain:
            by_count[len(scene.record["objects"])].append(scene)
    common = [group for group in by_count.values() if len(group) >= len(scenes) // 20]
    for group in zip(*common, strict=False):  # as many of each count
        for scene in group:
            yield scene, "how many things are there?", NUMBERS[len(scene.record["objects"])]


QUESTIONS: dict[str, Callable[[list[Scene], Random], Iterator[tuple[Scene, str, str]]]] = {
    "thing": _existence,
    "position": _position,
    "thing_colour": _colour,
    "colour": _presence,
    "background": _background,
    "place_colour": _place,
    "count": _count,
}
"""The kinds of questions. Half of those that are answered by yes or no have yes."""


def statements(scenes: list[Scene], random: Random) -> Iterator[Entry]:
    """Statements about two pictures, each with both orders of the same two, of which one makes it true."""
    for number, (one, other, mine, theirs) in enumerate(_differing(scenes, random)):
        said = [(f"the first picture shows {_a(mine)}", True), (f"the first picture shows {_a(theirs)}", False)]
        more = len(one.record["objects"]) - len(other.record["objects"])
        if more:
            said.append(("there are more things in the first picture", more > 0))
            said.append(("there are fewer things in the first picture", more < 0))
        yield from _both_orders(f"scenes-{number}", one, other, said)
    for number, (one, other, mine, theirs) in enumerate(_coloured_apart(scenes, random)):
        said = [(f"the first picture shows {_a(mine)} thing", True)]
        said += [(f"the first picture shows {_a(theirs)} thing", False)]
        yield from _both_orders(f"colours-{number}", one, other, said)
    for number, (one, other) in enumerate(_plain_pairs(scenes)):
        mine, theirs = (scene.record["background"]["colour"] for scene in (one, other))
        if mine.split()[-1] != theirs.split()[-1]:
            said = [(f"the first picture has {_a(mine)} background", True)]
            said += [(f"the first picture has {_a(theirs)} background", False)]
            yield from _both_orders(f"backgrounds-{number}", one, other, said)


def _both_orders(name: str, one: Scene, other: Scene, said: list[tuple[str, bool]]) -> Iterator[Entry]:
    """Yield statements about (one, other), and about (other, one), where each is what it was not."""
    for number, (sentence, true) in enumerate(said):
        for order, images in enumerate(([one.key, other.key], [other.key, one.key])):
            label = str(true != bool(order))
            identifier = f"{name}-{order}-{number}"
            yield {"images": images, "sentence": sentence, "label": label, "identifier": identifier}


def hypotheses(scenes: list[Scene], random: Random) -> Iterator[Entry]:
    """Hypotheses about things' colours, sizes and places: true, false, or left open (neutral).

    Left open is the colour or size of what is not in the picture, and a direction in which neither thing is clearly
    ahead. Each label is as frequent as the others in each family of words.
    """
    families: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    third = scenes[: len(scenes) // 3]  # nearly every scene has places to tell: they would outweigh the rest
    made = (*_coloured(scenes, random), *_placed(third, random), *_sized(scenes, random))
    for family, scene, sentence, label in made:
        families[family][label].append({"image": f"{scene.key}.jpg", "sentence": sentence, "label": label})
    chosen = []
    for labels in families.values():
        count = min(len(labels[label]) for label in ("contradiction", "neutral", "entailment"))
        chosen += [entry for entries in list(labels.values()) for entry in random.sample(entries, count)]
    yield from random.sample(chosen, len(chosen))


def _coloured(scenes: list[Scene], random: Random) -> Iterator[tuple[str, Scene, str, str]]:
    """Say of a recoloured thing its colour or another thing's; say the same of a scene without it."""
    found = [(scene, i) for scene in scenes for i in scene.single if scene.record["objects"][i]["turned"]]
    colours = [scene.record["objects"][i]["colour"] for scene, i in found]
    elsewhere = [scene for scene in scenes if scene.plain]
    for scene, i in found:
        thing = scene.record["objects"][i]
        true, other = random.random() < 0.5, random.choice(colours)
        if not true and other == thing["colour"]:
            continue
        sentence = f"the {thing['name']} is {thing['colour'] if true else other}"
        yield "colour", scene, sentence, "entailment" if true else "contradiction"
        without = random.choice(elsewhere)
        if thing["name"] not in without.names:
            yield "colour", without, sentence, "neutral"


def _placed(scenes: list[Scene], random: Random) -> Iterator[tuple[str, Scene, str, str]]:
    """Say of two things that one is left of or above the other, or right of or below it."""
    for scene in scenes:
        pairs = list(combinations(scene.single, 2))
        if not pairs:
            continue
        i, j = random.sample(random.choice(pairs), 2)
        for relation, words in AXES.items():
            label = "neutral"
            if scene.holds(relation, i, j) or scene.holds(relation, j, i):
                label = "entailment" if scene.holds(relation, i, j) else "contradiction"
            inverse = random.random() < 0.5
            first, second = (j, i) if inverse else (i, j)
            sentence = f"the {scene.single[first]} is {words[inverse]} the {scene.single[second]}"
            yield words[inverse], scene, sentence, label


def _sized(scenes: list[Scene], random: Random) -> Iterator[tuple[str, Scene, str, str]]:
    """Say that the thing of a colour is small or large; a family for each sentence, so that it tells nothing."""
    for scene in scenes:
        if scene.record["objects"][0]["size"] == "medium":  # so are all: nothing to compare with
            continue
        for colour in TARGETS:
            thing, said = scene.only(colour), random.choice(("small", "large"))
            label = "neutral" if scene.lacks(colour) else None
            if thing is not None:
                label = "entailment" if scene.record["objects"][thing]["size"] == said else "contradiction"
            if label:
                sentence = f"the {colour} thing is {said}"
                yield sentence, scene, sentence, label


def _differing(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, Scene, str, str]]:
    """Yield pairs of scenes, each scene once, with a name that only the first has and one that only the second."""
    for one, other in _plain_pairs(scenes):
        mine, theirs = sorted(one.names - other.names), sorted(other.names - one.names)
        if mine and theirs:
            yield one, other, random.choice(mine), random.choice(theirs)


def _coloured_apart(scenes: list[Scene], random: Random) -> Iterator[tuple[Scene, Scene, str, str]]:
    """Yield the same with colours that a thing has and that the other scene clearly lacks."""
    for one, other in _plain_pairs(scenes):
        mine, theirs = (
            [colour for colour in sorted(TARGETS) if colour in scene.colours and without.lacks(colour)]
            for scene, without in ((one, other), (other, one))
        )
        if mine and theirs:
            yield one, other, random.choice(mine), random.choice(theirs)


def _plain_pairs(scenes: list[Scene]) -> Iterator[tuple[Scene, Scene]]:
    """Yield plain scenes two by two."""
    plain = [scene for scene in scenes if scene.plain]
    return zip(plain[::2], plain[1::2], strict=False)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


MAKERS: dict[str, Callable[[list[Scene], Random], Iterator[Entry]]] = {
    "retrieval": captions,
    "grounding": expressions,
    "vqa": questions,
    "nlvr2": statements,
    "snli_ve": hypotheses,
    "text_assignment": captions,
    "probes": swaps,
}
"""By the name of the task."""
