"""What a demo caption asks for, and whether a picture shows it: GenEval's six categories (arXiv 2310.11513).

The caption alone is read, so that a prompt written by hand is judged as well as one of the demo's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitdance_scale.demo.scenes import BACKGROUNDS, COLORS, NUMBERS, PLACES, RELATIONS, SHAPES
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.scenes.reading import SeenObject, SeenScene

MAX_PLACE_ERROR = 0.16
"""Furthest from its place, as a share of the side; the places of the demo lie 0.26 apart."""
MAX_CLUTTER = 0.5
"""Most clutter of a picture that can be right: among enough debris some has the shape of a circle."""
MIN_OFFSET = 0.1
"""Least distance along the asked direction, as a share of that side."""

_OPENING = re.compile(r"^(a picture of|a drawing of|an image showing) ")
_BACKGROUND = re.compile(rf" on an? ({'|'.join(BACKGROUNDS)}) background$")
_ITEM = re.compile(rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})")
_COUNT = re.compile(rf"({'|'.join(NUMBERS.values())}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})(?:e?s)")
# The longer name first: "at the top" begins no other, but "in the top" does.
_WHERE = re.compile(rf"^(.+?) ({'|'.join(sorted((*RELATIONS, *PLACES, 'and'), key=len, reverse=True))})(?: (.+))?$")


@dataclass(frozen=True)
class Wanted:
    """An object that a caption asks for; color None: any."""

    shape: str
    color: str | None

    def fits(self, item: SeenObject) -> bool:
        """Whether a seen object is this."""
        return item.shape == self.shape and self.color in (None, item.color)


@dataclass(frozen=True)
class Asked:
    """What a caption asks for.

    Attributes:
        category: one of `demo_scenes.CATEGORIES`.
        objects: one or two objects.
        count: how many of the first object.
        place: where the first object is, one of `PLACES`; None: anywhere.
        relation: where the first object lies from the second, one of `RELATIONS`; None: anywhere.
        background: one of `BACKGROUNDS`; None: any.
    """

    category: str
    objects: tuple[Wanted, ...]
    count: int = 1
    place: str | None = None
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A picture against its caption.

    Attributes:
        is_correct: GenEval's rule: what was asked is there, other objects do not matter (except in counting); but
            never in a picture that is mostly clutter.
        is_exact: it is there and nothing else is.
        is_background_right: None where the caption does not ask for one.
    """

    is_correct: bool
    is_exact: bool
    is_background_right: bool | None


def parse_caption(caption: str) -> Asked:
    """Reads a caption of the demo's grammar.

    Raises:
        ConfigError: it is of another form, such as a rendered word.
    """
    phrase = _OPENING.sub("", caption)
    background = None
    if match := _BACKGROUND.search(phrase):
        phrase, background = phrase[: match.start()], match[1]
    if match := _COUNT.fullmatch(phrase):
        number = next(number for number, word in NUMBERS.items() if word == match[1])
        return Asked("counting", (Wanted(match[3], match[2]),), number, background=background)
    if match := _ITEM.fullmatch(phrase):
        wanted = Wanted(match[2], match[1])
        return Asked("colors" if wanted.color else "single_object", (wanted,), background=background)
    match = _WHERE.match(phrase)
    parts = [part for part in (match[1], match[3]) if part is not None] if match else []
    items = [item for part in parts if (item := _ITEM.fullmatch(part))]
    where = match[2] if match else ""
    if not items or len(items) != len(parts) or len(items) != (1 if where in PLACES else 2):
        raise ConfigError(
            f"caption {caption!r}: must be of the demo's grammar, such as 'a red circle to the left of a blue star', "
            "'three green rings' or 'a white heart at the top'"
        )
    objects = tuple(Wanted(item[2], item[1]) for item in items)
    if where in PLACES:
        return Asked("position", objects, place=where, background=background)
    if where in RELATIONS:
        return Asked("position", objects, relation=where, background=background)
    has_color = any(wanted.color for wanted in objects)
    return Asked("color_attribution" if has_color else "two_objects", objects, background=background)


def judge(asked: Asked, seen: SeenScene) -> Verdict:
    """Compares a picture with what was asked."""
    first = [item for item in seen.objects if asked.objects[0].fits(item)]
    if asked.count > 1:
        is_correct = len(first) == asked.count
    elif len(asked.objects) == 2:
        second = [item for item in seen.objects if asked.objects[1].fits(item)]
        is_correct = any(a is not b and _lies(a, b, asked.relation) for a in first for b in second)
    else:
        is_correct = any(_is_at(item, asked.place) for item in first)
    is_correct = is_correct and seen.clutter <= MAX_CLUTTER
    num_asked = asked.count + len(asked.objects) - 1
    is_background_right = None if asked.background is None else seen.background == asked.background
    return Verdict(is_correct, is_correct and len(seen.objects) == num_asked, is_background_right)


def _lies(first: SeenObject, second: SeenObject, relation: str | None) -> bool:
    if relation is None:
        return True
    dx, dy = RELATIONS[relation]
    along = (first.centre[0] - second.centre[0]) * dx + (first.centre[1] - second.centre[1]) * dy
    return along >= MIN_OFFSET


def _is_at(item: SeenObject, place: str | None) -> bool:
    if place is None:
        return True
    x, y = PLACES[place]
    return max(abs(item.centre[0] - x), abs(item.centre[1] - y)) <= MAX_PLACE_ERROR
