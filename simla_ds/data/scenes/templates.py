"""The sentences. A template is chosen only where all it claims is true of the scene.

`{a}`..`{d}` are noun phrases ("a large red car"), `{is_a}` is "is" or "are", `{at_a}` says where a is ("in the top
left corner"), `{other}` is "two other things", `{things}` is "three things". What a sentence `claims` is checked
against the boxes and kept in the sample: ("left of", "a", "b"), ("above", ...), ("next to", ...), ("bigger", ...),
("between", "m", "a", "b"), ("amid", "m", "g") (between the two things of group g); `{at_a}` claims its place itself.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Template:
    """One sentence form; `weight` is relative to the others that mention as many things."""

    text: str
    claims: tuple[tuple[str, ...], ...] = ()
    weight: float = 1.0

    @cached_property
    def parts(self) -> tuple[tuple[str, str | None], ...]:
        """(literal, field after it or None), in order."""
        return tuple((literal, field) for literal, field, _, _ in string.Formatter().parse(self.text))

    @cached_property
    def letters(self) -> tuple[str, ...]:
        """The noun phrases it mentions."""
        return tuple(sorted({field for _, field in self.parts if field and len(field) == 1}))


RELATING = 3
"""Weight of a form that claims a relation over one that doesn't: most scenes bear few of the former out."""


def _all(claims: tuple[tuple[str, ...], ...], weight: float, *texts: str) -> tuple[Template, ...]:
    """Return the wordings of one form, which share its weight."""
    return tuple(Template(text, claims, weight * (RELATING if claims else 1) / len(texts)) for text in texts)


LEFT, ABOVE, NEXT = (("left of", "a", "b"),), (("above", "a", "b"),), (("next to", "a", "b"),)

TEMPLATES: tuple[Template, ...] = (
    # one thing
    *_all((), 4, "{a} {at_a}", "a picture with {a} {at_a}", "there {is_a} {a} {at_a}", "{a} can be seen {at_a}"),
    *_all((), 2, "{a} and {other}", "{a} together with {other}", "{things} and one of them is {a}"),
    # two things: side by side
    *_all(LEFT, 5, "{a} to the left of {b}", "{a} on the left of {b}", "{a} {is_a} left of {b}",
          "{b} to the right of {a}", "{b} on the right of {a}", "{b} {is_b} to the right of {a}"),
    *_all(NEXT, 3, "{a} next to {b}", "{b} beside {a}", "{a} {is_a} right beside {b}", "{a} and {b} side by side"),
    # one over the other
    *_all(ABOVE, 5, "{a} above {b}", "{a} {is_a} above {b}", "{b} below {a}", "{b} {is_b} below {a}",
          "{b} underneath {a}", "{a} up above {b}"),
    # two things, where each is
    *_all((), 3, "{a} {at_a} and {b} {at_b}", "{a} {is_a} {at_a} and {b} {is_b} {at_b}",
          "there {is_a} {a} {at_a} with {b} {at_b}"),
    # two things, sizes and plain lists
    *_all((("bigger", "a", "b"),), 2, "{a} bigger than {b}", "{b} smaller than {a}", "{a} {is_a} larger than {b}"),
    *_all((), 2, "{a} and {b}", "a picture of {a} and {b}", "{a} together with {b}", "{a} with {b}"),
    *_all((), 1, "{things} and among them {a} and {b}", "{a}, {b} and {other}"),
    *_all((("amid", "a", "b"),), 4, "{a} between {b}", "{a} {is_a} in between {b}"),
    # three things
    *_all((("between", "a", "b", "c"),), 8, "{a} between {b} and {c}", "{a} {is_a} in between {b} and {c}",
          "{b}, {a} and {c} in a line with {a_again} in the middle"),
    *_all((("left of", "a", "b"), ("left of", "b", "c")), 3, "{a}, {b} and {c} from left to right",
          "from left to right there are {a}, {b} and {c}"),
    *_all((("above", "a", "b"), ("above", "b", "c")), 3, "{a}, {b} and {c} from top to bottom",
          "{a} on top, {b} in the middle and {c} at the bottom"),
    *_all((("left of", "a", "b"), ("above", "c", "a"), ("above", "c", "b")), 2, "{c} above {a} and {b}",
          "{a} to the left of {b} with {c} above them both"),
    *_all((("left of", "a", "b"), ("above", "a", "c"), ("above", "b", "c")), 2, "{c} below {a} and {b}",
          "{a} on the left of {b} and below them {c}"),
    *_all((("left of", "a", "c"), ("left of", "b", "c")), 2, "{a} and {b} to the left of {c}",
          "to the right of {a} and {b} {is_c} {c}"),
    *_all((("left of", "c", "a"), ("left of", "c", "b")), 1.5, "{a} and {b} to the right of {c}"),
    *_all(LEFT, 3, "{a} to the left of {b}, and {c} {at_c}", "{c} {at_c} and {b} to the right of {a}"),
    *_all(ABOVE, 3, "{a} above {b}, and {c} {at_c}", "{c} {at_c} while {b} {is_b} below {a}"),
    *_all(NEXT, 2, "{a} next to {b} with {c} {at_c}"),
    *_all((), 2, "{a} {at_a}, {b} {at_b} and {c} {at_c}"),
    *_all((), 1.5, "{a}, {b} and {c}", "a picture of {a}, {b} and {c}", "{a} with {b} and {c}"),
    *_all((("bigger", "a", "b"),), 1.5, "{a} bigger than {b}, and {c} {at_c}", "{b} smaller than {a}, and {c}"),
    # four things
    *_all((("left of", "a", "b"), ("left of", "c", "d")), 4, "{a} to the left of {b} while {c} {is_c} left of {d}",
          "{a} left of {b} and {d} to the right of {c}"),
    *_all((("left of", "a", "b"), ("above", "c", "d")), 4, "{a} to the left of {b} while {c} {is_c} above {d}",
          "{b} to the right of {a} while {d} {is_d} below {c}"),
    *_all((("above", "a", "b"), ("above", "c", "d")), 4, "{a} above {b} and {c} above {d}",
          "{a} {is_a} above {b} while {d} {is_d} below {c}"),
    *_all((("above", "a", "c"), ("above", "b", "d"), ("left of", "a", "b"), ("left of", "c", "d")), 4,
          "{a} and {b} at the top with {c} and {d} below them", "{a} and {b} above {c} and {d}"),
    *_all(LEFT, 1.5, "{a} to the left of {b}, {c} {at_c} and {d} {at_d}"),
    *_all((), 1.5, "{a}, {b}, {c} and {d}", "{things}: {a}, {b}, {c} and {d}", "{a} and {b} together with {c} and {d}"),
)  # fmt: skip

BY_MENTIONS: dict[int, tuple[Template, ...]] = {
    count: tuple(t for t in TEMPLATES if len(t.letters) == count) for count in range(1, 5)
}

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the center"),
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}

AFTER_PLAIN = ("on {bg}", "on {bg}", "against {bg}", "with {bg}")
BEFORE_PLAIN = ("on {bg}, ", "against {bg}, ")
AFTER_PHOTO = ("in front of {bg}", "in front of {bg}", "with {bg} in the background", "with {bg} behind")
BEFORE_PHOTO = ("in front of {bg}, ", "with {bg} in the background, ")
AFTER_WATER = ("in {bg}", "in {bg}", "with {bg} in the background")
BEFORE_WATER = ("in {bg}, ",)
