"""When an image shows what a prompt of GenEval asks for: rules over detected objects, without any network.

Source of every rule and number: djghosh13/geneval, evaluation/evaluate_images.py (`evaluate_image`, `evaluate`,
`relative_position` and the defaults at its end). Its NMS threshold is 1.0, which means that no box is suppressed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.geneval.classes import CLASSES

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

CONFIDENCE = 0.3
"""An object counts if its confidence is above this."""
COUNTING_CONFIDENCE = 0.9
"""The same in prompts of the tag `counting`."""
MAX_OBJECTS = 16
"""Objects of one class that are looked at, the most confident ones."""
_SHRINKAGE = 0.1
_MIN_COMPONENT = 0.5
_NO_OFFSET_PX = 1e-3


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object that was found in an image.

    Attributes:
        box: left, top, right, bottom in pixels; right and bottom are the first beyond it.
        confidence: 0 to 1.
        mask: bool [H, W] over the image, or None where it is the whole box.
    """

    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray | None = None


Detections = Mapping[str, Sequence[Detection]]
"""Objects by the name of their class (`classes.CLASSES`), in any order."""

ColourOf = Callable[[str, Sequence[Detection]], Sequence[str]]
"""Of a class and objects of it: the colour of each, one of `COLOURS`."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks for.

    Attributes:
        correct: every requirement holds.
        reasons: the requirements that do not, in words.
        objects: the objects that were looked at, by class, the most confident first.
    """

    correct: bool
    reasons: tuple[str, ...]
    objects: Detections = dataclasses.field(repr=False)

    def __str__(self) -> str:
        """The verdict in one line."""
        return "correct" if self.correct else "wrong: " + "; ".join(self.reasons)


def judge(record: Mapping[str, Any], detections: Detections, colour_of: ColourOf) -> Verdict:
    """The verdict on one image.

    Args:
        record: a line of `evaluation_metadata.jsonl` that `check_record` passes.
        detections: what was found in the image.
        colour_of: asked only where the record names a colour and enough objects were found.
    """
    objects = confident(detections, record["tag"])
    reasons: list[str] = []
    # Of each requirement, the objects that meet it; None if it is not met.
    matched: list[Sequence[Detection] | None] = []
    for wanted in record["include"]:
        found = objects.get(wanted["class"], ())[: wanted["count"]]
        problem = _missing(wanted, found, colour_of) or _misplaced(wanted, found, matched, record["include"])
        reasons += [problem] if problem else []
        matched.append(None if problem else found)
    for unwanted in record.get("exclude", ()):
        number = len(objects.get(unwanted["class"], ()))
        if number >= unwanted["count"]:
            reasons.append(f"expected fewer than {unwanted['count']} x {unwanted['class']}, found {number}")
    return Verdict(not reasons, tuple(reasons), objects)


def confident(detections: Detections, tag: str) -> dict[str, list[Detection]]:
    """The objects that count in a prompt of this tag: per class the `MAX_OBJECTS` most confident, best first.

    A class without any is left out. Overlapping boxes all stay.
    """
    # The published scorer compares in float32, in which a detector speaks.
    threshold = np.float32(COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE)
    kept = {}
    for name, found in detections.items():
        enough = [one for one in found if np.float32(one.confidence) > threshold]
        if enough:
            kept[name] = sorted(enough, key=lambda one: -one.confidence)[:MAX_OBJECTS]
    return kept


def relations(first: Detection, second: Detection) -> set[str]:
    """Where the first object is as seen from the second: none, one or two of `RELATIONS`.

    The offset of the centres is shrunk in each axis by a tenth of the sum of both sizes, and divided by the length of
    the offset before that; each component beyond 0.5 is a relation. Boxes that touch a lot thus have none.
    """
    boxes = np.array([first.box, second.box], dtype=np.float32).reshape(2, 2, 2)
    offset = np.subtract(*boxes.mean(axis=1))
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - _SHRINKAGE * sizes, 0)
    if (np.abs(shrunk) < _NO_OFFSET_PX).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    holds = (x < -_MIN_COMPONENT, x > _MIN_COMPONENT, y < -_MIN_COMPONENT, y > _MIN_COMPONENT)
    return {name for name, is_so in zip(RELATIONS, holds, strict=True) if is_so}


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Checks that a record can be judged.

    Args:
        record: what should be a line of `evaluation_metadata.jsonl`.
        where: names it in errors, such as the file and line.

    Raises:
        DataError: something in it is missing, or is nothing that the rules know.
    """
    problem = _fault(record)
    if problem:
        raise DataError(
            f"{where}: {problem}; it must be a line of GenEval's evaluation_metadata.jsonl, or one with the same keys "
            "and another prompt"
        )


def _missing(wanted: Mapping[str, Any], found: Sequence[Detection], colour_of: ColourOf) -> str | None:
    """Why objects do not meet a requirement's number and colour; `found` has no more than the number."""
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {count} x {name}, found {len(found)}"
    if "color" not in wanted:
        return None
    colours = list(colour_of(name, found))
    if colours.count(wanted["color"]) >= count:
        return None
    seen = ", ".join(f"{colours.count(colour)} x {colour}" for colour in COLOURS if colour in colours)
    return f"expected {count} x {wanted['color']} {name}, found {seen}"


def _misplaced(
    wanted: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    include: Sequence[Mapping[str, Any]],
) -> str | None:
    """Why objects do not meet a requirement's position."""
    if "position" not in wanted:
        return None
    relation, index = wanted["position"]
    name, other = wanted["class"], include[index]["class"]
    targets = matched[index]
    if targets is None:
        return f"expected {name} {relation} {other}, but no {other} is as expected"
    for one in found:
        for target in targets:
            seen = relations(one, target)
            if relation not in seen:
                where = " and ".join(name for name in RELATIONS if name in seen) or "too close to say"
                return f"expected {name} {relation} {other}, found it {where}"
    return None


def _fault(record: Mapping[str, Any]) -> str | None:
    if record.get("tag") not in TAGS:
        return f"tag is {record.get('tag')!r}, expected one of {', '.join(TAGS)}"
    if not isinstance(record.get("prompt"), str):
        return f"prompt is {record.get('prompt')!r}, expected a text"
    include, exclude = record.get("include"), record.get("exclude", [])
    if not isinstance(include, list) or not include:
        return f"include is {include!r}, expected a list of one or more objects"
    if not isinstance(exclude, list):
        return f"exclude is {exclude!r}, expected a list"
    for key, entries in (("include", include), ("exclude", exclude)):
        for index, entry in enumerate(entries):
            problem = _entry_fault(entry, index if key == "include" else 0)
            if problem:
                return f"{key}[{index}]{problem}"
    return None


def _entry_fault(entry: Any, num_before: int) -> str | None:
    if not isinstance(entry, Mapping):
        return f" is {entry!r}, expected an object with class and count"
    if entry.get("class") not in CLASSES:
        return f".class is {entry.get('class')!r}, which is no class that the detector knows (classes.py)"
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return f".count is {count!r}, expected an integer of at least 1"
    if entry.get("color", COLOURS[0]) not in COLOURS:
        return f".color is {entry['color']!r}, expected one of {', '.join(COLOURS)}"
    position = entry.get("position", [RELATIONS[0], -1])
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        return f".position is {position!r}, expected one of {', '.join(RELATIONS)} and the index of an earlier object"
    if "position" in entry and position[1] not in range(num_before):
        return f".position is {position!r}, but {position[1]!r} is the index of no earlier object"
    return None
