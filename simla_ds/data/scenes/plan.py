"""What is in a scene, before it has words or pixels: things, their looks and boxes, and a background.

Nothing drawn here is ambiguous: two things are either the same drawing (a group: "two dogs"), the same thing in two
plainly different colours or sizes (twins, always named by the difference), or things nobody would mix up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np
from PIL import Image

from simla_ds.data.scenes.colours import NEIGHBOURS, PLAIN, colours_to_try, is_held_out_pair, recoloured, visible_share
from simla_ds.data.scenes.kit import Concept, Kit, kit, opaque_pixels
from simla_ds.data.scenes.layout import SIDES, Box, place
from simla_ds.data.scenes.splits import Split

PHOTO = 0.35
"""Share of scenes in front of a photo; the others are on one colour."""
SIZED = 0.45
"""Share of scenes whose things are either plainly small or plainly large; in the others all are of medium size."""
TURNED = 0.6
"""Share of recolourable things that are recoloured."""
COUNTS, COUNT_WEIGHTS = (2, 3, 4), (4, 4, 3)
FORMS, FORM_WEIGHTS = ("distinct", "group", "colour twins", "size twins"), (68, 12, 13, 7)


@dataclass(frozen=True)
class Thing:
    """One pasted drawing. `turned`: the colour is not the drawing's own. `box` is set when it has been placed."""

    concept: Concept
    vendor: str
    colour: str | None
    turned: bool
    size: str
    longest: float
    box: Box = (0, 0, 0, 0)

    @property
    def drawing(self) -> Image.Image:
        """The RGBA picture at the kit's own size."""
        return drawing(self.vendor, self.concept.id, self.colour if self.turned else None)

    def shape(self, size: int) -> tuple[int, int]:
        """Return width and height in pixels within a picture of side `size`."""
        width, height = self.drawing.size
        scale = self.longest * size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class Entity:
    """What one noun phrase can point at: one thing, or several of the same look. `must_say` names attributes."""

    things: tuple[int, ...]
    must_say: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Background:
    """`name` is a noun phrase. A photo has `photo` (file) and `crop` (where to cut, 0..1); a plain one the others."""

    name: str
    colour: str | None = None
    rgb: tuple[int, int, int] = (0, 0, 0)
    photo: str | None = None
    crop: tuple[float, float] = (0.5, 0.5)


@dataclass(frozen=True)
class Plan:
    """A whole scene. `required` is the entity that the split is about, or None."""

    background: Background
    things: tuple[Thing, ...]
    entities: tuple[Entity, ...]
    required: int | None


@cache
def drawing(vendor: str, concept: str, colour: str | None) -> Image.Image:
    """Return a drawing, recoloured where `colour` is given."""
    turned = recoloured(vendor, concept, colour) if colour else None
    return turned or kit().sprite(vendor, concept)


@cache
def _pixels(vendor: str, concept: str, colour: str | None) -> np.ndarray:
    return opaque_pixels(drawing(vendor, concept, colour))[::5]  # a share needs no more


def draw_plan(split: Split, size: int, random: Random) -> Plan | None:
    """Draw one scene; None where the draw came to nothing (no room, no such colour): the caller draws again."""
    store = kit()
    count = random.choices(COUNTS, COUNT_WEIGHTS)[0]
    form = random.choices(FORMS, FORM_WEIGHTS)[0]
    photo = random.choice(store.backgrounds[split.photos]) if random.random() < PHOTO else None
    copies = 1 if form == "distinct" else 3 if form == "group" and count == 4 and random.random() < 0.3 else 2
    if copies == count:
        return None if form == "group" else _finish(split, size, random, store, photo, form, copies, 1)
    return _finish(split, size, random, store, photo, form, copies, count - copies + 1)


def _finish(
    split: Split, size: int, random: Random, store: Kit, photo: str | None, form: str, copies: int, kinds: int
) -> Plan | None:
    """Draw `kinds` concepts, the first shown `copies` times in the way `form` says."""
    first = _draw_thing(split, random, store, split.needs)
    if first is None or not _allowed(first.concept.id, photo, [], store):
        return None
    if (form == "group" and not first.concept.countable) or (form == "size twins" and first.concept.names_a_size):
        return None
    drawn = [first]
    while len(drawn) < kinds:
        needs = "concept" if split.needs == "concept" and random.random() < 0.4 else None
        thing = _draw_thing(split, random, store, needs)
        if thing and _allowed(thing.concept.id, photo, [other.concept.id for other in drawn], store):
            drawn.append(thing)
    made = _multiply(split, random, form, copies, drawn)
    if made is None:
        return None
    things, entities = _set_sizes(*made, form, random)
    background = _draw_background(photo, things, random)
    boxes = place([thing.shape(size) for thing in things], size, random) if background else None
    if background is None or boxes is None:
        return None
    placed = tuple(replace(thing, box=box) for thing, box in zip(things, boxes, strict=True))
    return Plan(background, placed, tuple(entities), 0 if split.needs else None)


def _draw_thing(split: Split, random: Random, store: Kit, needs: str | None) -> Thing | None:
    vendor = random.choice(split.vendors(store))
    concept = store.concepts[random.choice(store.held_out if needs == "concept" else store.seen)]
    turned = None
    if needs == "pair" or random.random() < TURNED:
        turned = _turned_colour(vendor, concept.id, random, held_out=needs == "pair")
        if needs == "pair" and turned is None:
            return None
    return Thing(concept, vendor, turned or concept.colours[vendor], turned is not None, "medium", 0.0)


def _turned_colour(
    vendor: str, concept: str, random: Random, *, held_out: bool, unlike: str | None = None
) -> str | None:
    """Draw a colour that the drawing can really be turned to and that nobody takes for `unlike`; None without one."""
    colours = list(colours_to_try(vendor, concept))
    random.shuffle(colours)
    for colour in colours:
        if is_held_out_pair(colour, concept) != held_out or not _tell_apart(colour, unlike):
            continue
        if recoloured(vendor, concept, colour):
            return colour
    return None


def _tell_apart(colour: str, other: str | None) -> bool:
    return colour != other and frozenset((colour, other)) not in NEIGHBOURS


def _allowed(concept: str, photo: str | None, others: list[str], store: Kit) -> bool:
    if photo is not None:
        picture = store.photos[photo]
        if concept in store.may_contain[picture.may_contain] or (picture.painting and concept == "framed_picture"):
            return False
    return not any(concept == other or store.confusable(concept, other) for other in others)


def _multiply(
    split: Split, random: Random, form: str, copies: int, drawn: list[Thing]
) -> tuple[list[Thing], list[Entity]] | None:
    """Show the first thing `copies` times; return all things and what points at them, the first thing first."""
    first, rest = drawn[0], drawn[1:]
    must = frozenset({"colour"}) if split.needs == "pair" else frozenset()
    if form in ("distinct", "group"):
        things, entities = [first] * copies, [Entity(tuple(range(copies)), must)]
    else:
        second = first
        if form == "colour twins":
            second = _other_colour(first, random)
            if second is None:
                return None
        said = must | {form.split()[0]}
        things, entities = [first, second], [Entity((0,), said), Entity((1,), said)]
    for thing in rest:
        entities.append(Entity((len(things),)))
        things.append(thing)
    return things, entities


def _other_colour(thing: Thing, random: Random) -> Thing | None:
    """Return the same drawing in a colour nobody would mix up with the first, or None."""
    own = thing.concept.colours[thing.vendor]
    if thing.colour is None:
        return None
    if own and _tell_apart(own, thing.colour) and random.random() < 0.3:
        return replace(thing, colour=own, turned=False)
    colour = _turned_colour(thing.vendor, thing.concept.id, random, held_out=False, unlike=thing.colour)
    return replace(thing, colour=colour, turned=True) if colour else None


def _set_sizes(
    things: list[Thing], entities: list[Entity], form: str, random: Random
) -> tuple[list[Thing], list[Entity]]:
    """Give each thing a size; the things of one entity get the same."""
    sized = form == "size twins" or (len(entities) > 1 and random.random() < SIZED)
    words = ["medium"] * len(entities)
    if sized:
        words = [random.choice(("small", "large")) for _ in entities]
        words[:2] = random.sample(("small", "large"), 2)
        if form != "size twins":  # twins are the first two entities: they must differ
            random.shuffle(words)
    things = list(things)
    for entity, word in zip(entities, words, strict=True):
        longest = random.uniform(*SIDES[word])
        for index in entity.things:
            things[index] = replace(things[index], size=word, longest=longest)
    return things, entities


def _draw_background(photo: str | None, things: list[Thing], random: Random) -> Background | None:
    """Return the photo, or a colour that every thing stands out from and that none of them has."""
    if photo is not None:
        crop = (round(random.uniform(0.25, 0.75), 3), round(random.uniform(0.25, 0.75), 3))
        return Background(kit().photos[photo].name, photo=photo, crop=crop)
    name = random.choice(sorted(PLAIN))
    rgb = random.choice(PLAIN[name])
    for thing in things:
        key = (thing.vendor, thing.concept.id, thing.colour if thing.turned else None)
        if thing.colour == name.split()[-1] or visible_share(_pixels(*key), rgb) < 0.6:
            return None
    return Background(f"a{'n' if name == 'orange' else ''} {name} background", colour=name, rgb=rgb)
