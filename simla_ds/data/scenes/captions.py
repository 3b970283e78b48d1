"""A true sentence about a scene, with the place of every phrase in it and everything it claims."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from simla_ds.data.scenes import templates
from simla_ds.data.scenes.kit import kit
from simla_ds.data.scenes.layout import Box
from simla_ds.data.scenes.plan import Entity, Plan, Thing
from simla_ds.data.scenes.relations import above, between, left_of, next_to, places
from simla_ds.data.scenes.templates import BY_MENTIONS, PLACE_WORDS, Template

MAX_WORDS = 28
NUMBERS = ("no", "one", "two", "three", "four")
SAY_COLOUR, SAY_SIZE = 0.9, 0.6
SAY_BACKGROUND, BACKGROUND_FIRST = 0.85, 0.15
MENTION_ALL = 0.6
"""Share of captions that name everything in the picture, sentence forms permitting."""


@dataclass(frozen=True)
class Phrase:
    """Characters [start, end) of the caption point at these things; a background phrase points at none."""

    start: int
    end: int
    things: tuple[int, ...]


@dataclass(frozen=True)
class Caption:
    """`claims`: [word, thing, ...] lists, e.g. ["left of", 0, 1], ["at", 2, "top left"], ["count", 3]."""

    text: str
    phrases: tuple[Phrase, ...]
    claims: tuple[tuple, ...]
    background_said: bool


class Writer:
    """Writes about one scene. Pieces are appended one by one, so that spans need no search afterwards."""

    def __init__(self, plan: Plan, size: int, random: Random) -> None:
        self.plan, self.size, self.random = plan, size, random
        self.text = ""
        self.phrases: list[Phrase] = []
        self.claims: list[tuple] = []

    def say(self, text: str, things: tuple[int, ...] | None = None) -> None:
        """Append text; with `things`, as a phrase that points at them."""
        if things is not None:
            self.phrases.append(Phrase(len(self.text), len(self.text) + len(text), things))
        self.text += text

    def boxes(self, entity: Entity) -> list[Box]:
        """Return the boxes of an entity's things."""
        return [self.plan.things[index].box for index in entity.things]

    def expand(self, claim: tuple[str, ...], cast: dict[str, Entity]) -> list[tuple] | None:
        """Return what a template's claim says thing by thing, or None where it is not true."""
        word, *letters = claim
        entities = [cast[letter].things for letter in letters]
        if word in ("amid", "between"):
            indices = [index for things in entities for index in things]
            if len(indices) != 3 or len(entities[0]) != 1:
                return None
            facts: list[tuple] = [("between", *indices)]
        else:
            facts = [(word, i, j) for i in entities[0] for j in entities[1]]
        return facts if all(holds(fact, self.plan.things, self.size) for fact in facts) else None

    def noun_phrase(self, entity: Entity) -> str:
        """Return "a large red car", "two small dogs", "some scissors": attributes are said by chance or by need."""
        thing = self.plan.things[entity.things[0]]
        concept = thing.concept
        words: list[str] = []
        if not concept.names_a_size and ("size" in entity.must_say or self.random.random() < SAY_SIZE):
            words += {"small": ["small"], "large": [self.random.choice(("large", "big"))]}.get(thing.size, [])
        if thing.colour and ("colour" in entity.must_say or self.random.random() < SAY_COLOUR):
            words.append(thing.colour)
        if len(entity.things) > 1:
            return " ".join([NUMBERS[len(entity.things)], *words, concept.plural])
        article = concept.article
        if words and article != "some":
            article = "an" if words[0] == "orange" else "a"
        return " ".join([article, *words, concept.name])

    def is_plural(self, entity: Entity) -> bool:
        """Whether the verb is "are"."""
        first, *others = entity.things
        return bool(others) or self.plan.things[first].concept.plural_only

    def where(self, entity: Entity) -> str | None:
        """Return where an entity is, claiming so, or None where no word is clearly true of all its things."""
        common = [word for word in PLACE_WORDS if all(word in places(box, self.size) for box in self.boxes(entity))]
        if not common:
            return None
        corners = [word for word in common if " " in word]
        word = corners[0] if corners and self.random.random() < 0.65 else self.random.choice(common)
        if any(claim[0] == "at" and claim[2] == word for claim in self.claims):
            return None  # "a cat on the left and a dog on the left" is true, but nobody says so
        self.claims += [("at", index, word) for index in entity.things]
        return self.random.choice(PLACE_WORDS[word])

    def fill(self, template: Template, cast: dict[str, Entity]) -> bool:
        """Append the template with this cast; False where it cannot be said of this scene."""
        for claim in template.claims:
            facts = self.expand(claim, cast)
            if facts is None:
                return False
            self.claims += facts
        for literal, field in template.parts:
            self.say(literal)
            if field is not None and not self.fill_field(field, cast):
                return False
        return True

    def fill_field(self, field: str, cast: dict[str, Entity]) -> bool:
        """Append one field of a template; False where it has no true filling."""
        everything = tuple(range(len(self.plan.things)))
        if field == "things":
            if any(thing.concept.mass or thing.concept.plural_only for thing in self.plan.things):
                return False
            self.claims.append(("count", len(everything)))
            self.say(f"{NUMBERS[len(everything)]} things", everything)
        elif field == "other":
            named = {index for entity in cast.values() for index in entity.things}
            left = tuple(index for index in everything if index not in named)
            if not left or any(not self.plan.things[index].concept.countable for index in left):
                return False
            self.claims.append(("count", len(everything)))
            self.say(f"{NUMBERS[len(left)]} other thing{'s' if len(left) > 1 else ''}", left)
        elif field.startswith("at_"):
            words = self.where(cast[field[-1]])
            if words is None:
                return False
            self.say(words)
        elif field.startswith("is_"):
            self.say("are" if self.is_plural(cast[field[-1]]) else "is")
        elif field == "a_again":
            self.say(f"the {self.plan.things[cast['a'].things[0]].concept.name}", cast["a"].things)
        else:
            self.say(self.noun_phrase(cast[field]), cast[field].things)
        return True

    def background(self, form: str) -> None:
        """Append a background phrase such as "in front of {bg}"."""
        before, after = form.split("{bg}")
        self.say(before)
        self.say(self.plan.background.name, ())
        self.say(after)


def holds(fact: tuple, things: tuple[Thing, ...], size: int) -> bool:
    """Whether a spatial or size fact about things is true."""
    word, *indices = fact
    boxes = [things[index].box for index in indices]
    if word == "bigger":
        return things[indices[0]].size == "large" and things[indices[1]].size == "small"
    return {"left of": left_of, "above": above, "next to": next_to, "between": between}[word](*boxes, size)


def _background_forms(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if plan.background.photo is None:
        return templates.BEFORE_PLAIN, templates.AFTER_PLAIN
    if kit().photos[plan.background.photo].may_contain == "underwater":
        return templates.BEFORE_WATER, templates.AFTER_WATER
    return templates.BEFORE_PHOTO, templates.AFTER_PHOTO


def _draw_cast(plan: Plan, template: Template, random: Random) -> dict[str, Entity] | None:
    """Draw who plays which letter; the entity that the split is about is always in it."""
    entities = random.sample(plan.entities, len(plan.entities))
    if plan.required is not None:
        entities.remove(plan.entities[plan.required])
        entities = [plan.entities[plan.required], *entities]
    chosen = entities[: len(template.letters)]
    if "in a line" in template.text and plan.things[chosen[0].things[0]].concept.plural_only:
        return None
    random.shuffle(chosen)
    return dict(zip(template.letters, chosen, strict=True))


def write_caption(plan: Plan, size: int, random: Random) -> Caption | None:
    """Return a true caption of at most MAX_WORDS words, or None where no sentence form came out true."""
    count = len(plan.entities)
    if random.random() > MENTION_ALL:
        count = random.randint(1, count)
    options = BY_MENTIONS[count]
    first, after = _background_forms(plan)
    for _ in range(40):
        template = random.choices(options, [t.weight for t in options])[0]
        cast = _draw_cast(plan, template, random)
        if cast is None:
            continue
        writer = Writer(plan, size, random)
        said = random.random() < SAY_BACKGROUND
        leading = random.random() < BACKGROUND_FIRST and not template.text.startswith("a picture")
        if said and leading:
            writer.background(random.choice(first))
        if not writer.fill(template, cast):
            continue
        if said and not leading:
            writer.say(", " if template.text.endswith("{at_c}") else " ")
            once = [form for form in after if not form.startswith("with")]  # "with a dog with a tower behind" drags
            writer.background(random.choice(once if " with " in template.text else after))
        if len(writer.text.split()) <= MAX_WORDS:
            return Caption(writer.text, tuple(writer.phrases), tuple(writer.claims), said)
    return None
