import json
import re

import numpy as np
import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.geneval.classes import CLASSES, COCO_CLASSES
from bitdance_scale.evaluation.geneval.rules import (
    COLOURS,
    RELATIONS,
    TAGS,
    Detection,
    check_record,
    confident,
    judge,
    relations,
)
from tests.benchmark_data import benchmark_data

NOTHING = "no colour is asked for"


def thing(x: float, y: float, confidence: float = 0.95, side: float = 40) -> Detection:
    """A square around (x, y)."""
    half = side / 2
    return Detection((x - half, y - half, x + half, y + half), confidence)


def refuse(name, objects):
    raise AssertionError(NOTHING)


def record(*include, tag="two_object", exclude=None):
    return {"tag": tag, "prompt": "p", "include": list(include)} | ({} if exclude is None else {"exclude": exclude})


def one(name, count=1, **more):
    return {"class": name, "count": count} | more


def test_objects_count_from_above_the_threshold_of_the_tag():
    at = [thing(0, 0, value) for value in (0.3, float(np.float32(0.3)), 0.301, 0.9, float(np.float32(0.9)), 0.901)]
    found = confident({"dog": at}, "colors")["dog"]
    # float32(0.3) is above 0.3 in float64; the published scorer compares in float32.
    assert [round(one.confidence, 4) for one in found] == [0.901, 0.9, 0.9, 0.301]
    assert [one.confidence for one in confident({"dog": at}, "counting")["dog"]] == [0.901]
    assert confident({"dog": [thing(0, 0, 0.2)]}, "colors") == {}


def test_the_best_sixteen_of_a_class_are_looked_at_and_boxes_may_overlap():
    at = [thing(0, 0, 0.4 + index / 100) for index in (5, 3, 19, 0, 7, 1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16)]
    found = confident({"dog": at, "cat": at[:2]}, "colors")
    assert [round(one.confidence * 100) for one in found["dog"]] == [59, *range(56, 41, -1)]
    assert len(found["cat"]) == 2
    # An `exclude` of 17 can thus never fail.
    assert judge(record(one("dog"), exclude=[one("dog", 17)]), {"dog": at}, refuse).correct
    assert not judge(record(one("dog"), exclude=[one("dog", 16)]), {"dog": at}, refuse).correct


def test_too_few_objects():
    verdict = judge(record(one("dog", 2), one("cat")), {"dog": [thing(0, 0)]}, refuse)
    assert not verdict.correct
    assert str(verdict) == "wrong: expected 2 x dog, found 1; expected 1 x cat, found 0"
    assert str(judge(record(one("dog")), {"dog": [thing(0, 0)] * 3}, refuse)) == "correct"


def test_only_the_most_confident_objects_are_asked_for_their_colour():
    asked = []

    def colour_of(name, objects):
        asked.append((name, [one.confidence for one in objects]))
        return ["red" if one.confidence == 0.5 else "blue" for one in objects]

    found = {"car": [thing(0, 0, 0.5), thing(50, 0, 0.8), thing(99, 0, 0.6)]}
    verdict = judge(record(one("car", 2, color="red"), tag="colors"), found, colour_of)
    assert asked == [("car", [0.8, 0.6])]
    assert str(verdict) == "wrong: expected 2 x red car, found 2 x blue"
    assert judge(record(one("car", 2, color="blue"), tag="colors"), found, colour_of).correct
    assert judge(record(one("car", 3, color="blue"), tag="colors"), found, colour_of).reasons == (
        "expected 3 x blue car, found 1 x red, 2 x blue",
    )
    # Without enough objects no colour is asked for.
    assert judge(record(one("car", 4, color="red")), found, refuse).reasons == ("expected 4 x car, found 3",)


def test_fewer_objects_than_an_exclusion_names():
    counting = record(one("dog", 2), tag="counting", exclude=[one("dog", 3)])
    assert judge(counting, {"dog": [thing(0, 0)] * 2}, refuse).correct
    assert judge(counting, {"dog": [*[thing(0, 0)] * 2, thing(0, 0, 0.9)]}, refuse).correct
    verdict = judge(counting, {"dog": [thing(0, 0)] * 3}, refuse)
    assert str(verdict) == "wrong: expected fewer than 3 x dog, found 3"


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        # Two squares with a side of 40: each axis is shrunk by 0.1 * 80 = 8.
        ((-100, 0), {"left of"}),  # -92 / 100
        ((100, 0), {"right of"}),
        ((0, -100), {"above"}),
        ((0, 100), {"below"}),
        ((-60, 60), {"left of", "below"}),  # 52 / 84.9 = 0.613
        ((-30, 30), {"left of", "below"}),  # 22 / 42.4 = 0.519
        ((-27, 27), set()),  # 19 / 38.2 = 0.498
        ((16, 0), set()),  # 8 / 16 = 0.5 is not above 0.5
        ((17, 0), {"right of"}),  # 9 / 17 = 0.529
        ((80, 39), {"right of"}),  # 72 / 89, 31 / 89 = 0.348
        ((8, -8), set()),  # nothing is left
        ((0, 0), set()),
    ],
)
def test_where_an_object_is(offset, expected):
    assert relations(thing(500 + offset[0], 400 + offset[1]), thing(500, 400)) == expected


def test_sizes_of_each_axis_shrink_that_axis():
    # Centres (50, 10) and (90, 40): offset (-40, -30), length 50; sizes 100 + 20 and 20 + 10.
    first, second = Detection((0, 0, 100, 20), 1.0), Detection((80, 35, 100, 45), 1.0)
    # (-40 + 12) / 50 = -0.56 and (-30 + 3) / 50 = -0.54
    assert relations(first, second) == {"left of", "above"}
    # One more pixel of width: (-40 + 12.8) / 50 = -0.544 still; of height 10 more: (-30 + 4) / 50 = -0.52.
    assert relations(Detection((0, -5, 100, 25), 1.0), second) == {"left of", "above"}
    assert relations(Detection((0, -20, 100, 40), 1.0), second) == {"left of"}  # (-30 + 7) / 50 = -0.46


def test_positions_hold_between_all_objects_of_both_groups():
    wanted = record(one("cat"), one("dog", 2, position=["left of", 0]), tag="position")
    cat = [thing(500, 0)]
    assert judge(wanted, {"cat": cat, "dog": [thing(0, 0), thing(100, 0)]}, refuse).correct
    verdict = judge(wanted, {"cat": cat, "dog": [thing(0, 0), thing(900, 0)]}, refuse)
    assert str(verdict) == "wrong: expected dog left of cat, found it right of"
    verdict = judge(wanted, {"cat": cat, "dog": [thing(0, 0), thing(505, 0)]}, refuse)
    assert verdict.reasons == ("expected dog left of cat, found it too close to say",)
    # The most confident dogs are what counts.
    three = [thing(0, 0, 0.5), thing(100, 0, 0.8), thing(900, 0, 0.7)]
    assert not judge(wanted, {"cat": cat, "dog": three}, refuse).correct


def test_a_position_needs_the_other_object_as_expected():
    wanted = record(one("cat", color="black"), one("dog", position=["left of", 0]), tag="position")
    found = {"cat": [thing(500, 0)], "dog": [thing(0, 0)]}
    verdict = judge(wanted, found, lambda *_: ["white"])
    assert verdict.reasons == (
        "expected 1 x black cat, found 1 x white",
        "expected dog left of cat, but no cat is as expected",
    )
    assert judge(wanted, found, lambda *_: ["black"]).correct


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tag": "sizes"}, "tag is 'sizes', expected one of single_object"),
        ({"prompt": None}, "prompt is None"),
        ({"include": []}, "include is []"),
        ({"include": ["dog"]}, "include[0] is 'dog'"),
        ({"include": [one("mouse")]}, "include[0].class is 'mouse'"),
        ({"include": [one("dog", 0)]}, "include[0].count is 0"),
        ({"include": [one("dog", True)]}, "include[0].count is True"),
        ({"include": [one("dog", color="grey")]}, "include[0].color is 'grey', expected one of red"),
        ({"include": [one("dog"), one("cat", position=["near", 0])]}, "include[1].position is ['near', 0]"),
        ({"include": [one("dog"), one("cat", position=["above", 1])]}, "1 is the index of no earlier object"),
        ({"include": [one("dog"), one("cat", position=["above", -1])]}, "-1 is the index of no earlier object"),
        ({"exclude": {}}, "exclude is {}"),
        ({"exclude": [one("dog", "3")]}, "exclude[0].count is '3'"),
    ],
)
def test_records_that_cannot_be_judged(wrong, message):
    with pytest.raises(DataError, match=f"^lines.jsonl:3: .*{re.escape(message)}"):
        check_record(record(one("dog")) | wrong, "lines.jsonl:3")


def test_coco_has_eighty_classes():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == len(set(CLASSES)) == 80
    assert [new for old, new in zip(COCO_CLASSES, CLASSES, strict=True) if old != new] == [
        "computer mouse",
        "tv remote",
        "computer keyboard",
    ]


def test_the_class_names_are_the_published_ones():
    assert benchmark_data("geneval_object_names.txt").read_text(encoding="utf-8").split("\n")[:80] == list(CLASSES)


def perfect(line):
    """Detections that show what a line asks for, and the colours of those objects by their box."""
    steps = dict(zip(RELATIONS, ((-300, 0), (300, 0), (0, -300), (0, 300)), strict=True))
    found, colours = {}, {}
    for index, wanted in enumerate(line["include"]):
        x, y = steps[wanted["position"][0]] if "position" in wanted else (700 * index, 0)
        found[wanted["class"]] = [thing(1000 + x + 50 * number, 1000 + y) for number in range(wanted["count"])]
        colours |= {one.box: wanted.get("color") for one in found[wanted["class"]]}
    return found, colours


def violations(line, found, colours):
    """What each of them makes wrong, with detections and colours that differ from the perfect ones in this alone."""
    limit = 0.9 if line["tag"] == "counting" else 0.3
    for wanted in line["include"]:
        name = wanted["class"]
        yield "too few", found | {name: found[name][1:]}, colours
        faint = [*found[name][1:], Detection(found[name][0].box, limit)]
        yield "too faint", found | {name: faint}, colours
        if "color" in wanted:
            other = COLOURS[COLOURS.index(wanted["color"]) - 1]
            yield "another colour", found, colours | {found[name][0].box: other}
        if "position" in wanted:
            target = found[line["include"][wanted["position"][1]]["class"]][0].box
            mirrored = [
                Detection(tuple(2 * target[side] - one.box[side] for side in range(4)), one.confidence)
                for one in found[name]
            ]
            yield "on the other side", found | {name: mirrored}, colours
    for unwanted in line.get("exclude", ()):
        name = unwanted["class"]
        yield "too many", found | {name: [*found[name], thing(5, 5)]}, colours


@pytest.mark.parametrize("file", ["geneval_evaluation_metadata.jsonl", "geneval_evaluation_metadata_long.jsonl"])
def test_published_lines_are_judged_right(file):
    lines = [json.loads(line) for line in benchmark_data(file).read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 553
    assert {line["tag"] for line in lines} == set(TAGS)
    kinds = set()
    for line in lines:
        check_record(line, file)
        found, colours = perfect(line)

        def colour_of(name, objects, colours=colours):
            return [colours[one.box] for one in objects]

        assert judge(line, found, colour_of).correct, line
        for kind, worse, others in violations(line, found, colours):
            kinds.add(kind)

            def worse_colour_of(name, objects, colours=others):
                return [colours[one.box] for one in objects]

            verdict = judge(line, worse, worse_colour_of)
            assert not verdict.correct, (kind, line)
            assert verdict.reasons
    assert kinds == {"too few", "too faint", "another colour", "on the other side", "too many"}
