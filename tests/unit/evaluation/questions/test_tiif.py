from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.questions.judge import JudgeError
from bitdance_scale.evaluation.questions.tiif import (
    ADVANCED_GROUPS,
    BASIC_GROUPS,
    DIMENSIONS,
    GROUPS,
    TiifItem,
    answer_lines,
    find_images,
    measure_tiif,
    read_questions,
    scores_of,
)
from tests.benchmark_data import benchmark_data
from tests.unit.evaluation.questions.saying import Saying


def line(dimension="style", questions=("Is it?",), answers=("yes",), **changes) -> str:
    record = {"type": dimension, "yn_question_list": list(questions), "yn_answer_list": list(answers)}
    return json.dumps(record | changes)


def write(folder, **files: str):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}_eval_prompts.jsonl").write_text(content, encoding="utf-8")
    return folder


def draw(root, dimension, length, index, value):
    path = root / dimension / "ours" / f"{length}_description" / f"{index}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(path)


def test_files_are_read(tmp_path):
    two = f"{line(questions=('Is A?  ', 'Is B?'), answers=('Yes', 'no'))}\n\n{line(corrspond_idx=3)}\n"
    items = read_questions(write(tmp_path / "q", style=two, text=line("text")))
    assert items == [
        TiifItem("style", 0, ("Is A?", "Is B?"), (True, False)),
        TiifItem("style", 1, ("Is it?",), (True,)),
        TiifItem("text", 0, ("Is it?",), (True,)),
    ]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "line 1: is no JSON"),
        ('{"type": "style", "short_description": "a", "long_description": "b"}', "line 1: has no type.*testmini_eval"),
        (f"{line()}\n{line('taste')}", "line 2: has the type 'taste', which is none of TIIF-Bench"),
        (f"{line()}\n{line('text')}", "holds types style and text"),
        (line(answers=("yes", "no")), "line 1: has 1 questions and 2 answers"),
        (line(questions=(), answers=()), "line 1: has 0 questions and 0 answers"),
        (line(answers=("maybe",)), "line 1: has the answer 'maybe', expected yes or no"),
        (line(yn_answer_list="yes"), "line 1: yn_question_list and yn_answer_list must be lists"),
        ("\n", "is empty"),
    ],
)
def test_lines_against_the_rules(tmp_path, content, match):
    with pytest.raises(DataError, match=f"style_eval_prompts.jsonl: {match}"):
        read_questions(write(tmp_path, style=content))


def test_folders_against_the_rules(tmp_path):
    with pytest.raises(DataError, match="has no .jsonl files"):
        read_questions(tmp_path)
    with pytest.raises(DataError, match="style_eval_prompts.jsonl: has the type style, as .*style2_eval_prompts"):
        read_questions(write(tmp_path, style=line(), style2=line()))


def test_answers_are_lines_that_begin_with_yes_or_no():
    assert answer_lines("Yes, it is.\n\n no there is none\nYES", 3) == [True, False, True]
    assert answer_lines("Here are the answers:\nyes\nno", 2) == [True, False]
    assert answer_lines("yes", 2) is None
    assert answer_lines("yes\nno\nno", 2) is None
    assert answer_lines("1. yes\n2. no", 2) is None
    assert answer_lines("yesterday\nnothing", 2) is None


def test_groups_are_the_published_ones():
    assert (len(DIMENSIONS), len(set(DIMENSIONS)), len(GROUPS)) == (39, 39, 9)
    assert [len(names) for names in GROUPS.values()] == [4, 4, 4, 8, 8, 8, 1, 1, 1]
    assert {"numeracy+color", "negation+texture"} < {*GROUPS["attribute+reasoning"]}
    assert {"comparison+2d", "differentiation+3d"} < {*GROUPS["relation+reasoning"]}
    assert {*BASIC_GROUPS, *ADVANCED_GROUPS, "real world"} == {*GROUPS}


def test_scores_are_means_of_questions_then_dimensions_then_groups():
    # One item of one question per dimension, answered right; but for three dimensions.
    items = [TiifItem(name, 0, ("?",), (True,)) for name in DIMENSIONS if name != "numeracy"]
    answers = {(item.dimension, 0): [True] for item in items}
    items += [TiifItem("numeracy", 0, ("?",) * 3, (True, False, True)), TiifItem("numeracy", 1, ("?",), (False,))]
    answers |= {("numeracy", 0): [True, False, None], ("numeracy", 1): [True]}
    answers[("text", 0)] = answers[("shape+2d", 0)] = [False]
    scores = scores_of(items, answers)
    assert scores.dimensions["numeracy"] == 50
    assert scores.groups["reasoning"] == pytest.approx(100 * 3.5 / 4)
    assert scores.groups["attribute+relation"] == pytest.approx(100 * 7 / 8)
    assert (scores.groups["text"], scores.groups["style"]) == (0, 100)
    assert scores.basic == pytest.approx(100 * 11.5 / 12)
    assert scores.advanced == pytest.approx(100 * 24 / 26)
    assert scores.overall == pytest.approx((100 * 6 + 0 + 87.5 + 87.5) / 9)
    some = scores_of([items[0]], answers)
    assert (some.overall, some.advanced, list(some.groups)) == (None, None, ["attribute"])


@pytest.fixture
def small(tmp_path):
    """Two dimensions with 2 + 1 items; the images say which they are."""
    questions = write(
        tmp_path / "questions",
        style=f"{line(questions=('Is A?', 'Is B?'), answers=('yes', 'no'))}\n{line(questions=('Is C?',))}",
        text=line("text", questions=("Is D?",)),
    )
    for base, length in ((0, "short"), (100, "long")):
        draw(tmp_path / "images", "style", length, 0, base + 1)
        draw(tmp_path / "images", "style", length, 1, base + 2)
        draw(tmp_path / "images", "text", length, 0, base + 3)
    items = read_questions(questions)
    return items, tmp_path / "images"


def test_one_request_for_all_questions_of_an_image(small):
    items, root = small

    def says(pixel, question):
        if "Answer with one word" in question:
            return {"Is A?": "Yes.", "Is B?": "hm"}[question[:5]]
        # Two answers for the first image of the short prompts, one for that of the long ones.
        return {1: "yes, clearly\nno, not at all", 101: "yes"}.get(pixel[0], "no" if pixel[0] == 3 else "yes")

    judge = Saying(says, follows_instructions=True)
    report = measure_tiif(items, find_images(root, "ours", items), judge, max_unclear_share=0.2)
    assert len(judge.heard) == 6 + 2
    assert judge.heard[0].count("Is A?\nIs B?") == 1 and "##" not in judge.heard[0]
    assert report.answers["short", "style", 0] == [True, False]
    assert report.answers["long", "style", 0] == [True, None]
    assert (report.asked_singly, report.unclear.asked, report.unclear.number) == (1, 8, 1)
    assert report.scores["short"].dimensions == {"style": 100, "text": 0}
    assert report.scores["long"].dimensions == {"style": pytest.approx(100 * 2 / 3), "text": 100}
    with pytest.raises(JudgeError, match="answered 1 of 8 questions"):
        measure_tiif(items, find_images(root, "ours", items), judge)


def test_a_judge_of_single_questions_is_asked_them(small):
    items, root = small
    judge = Saying(lambda pixel, question: "no" if question == "Is B?" else "yes")
    report = measure_tiif(items, find_images(root, "ours", items), judge)
    assert judge.heard == ["Is A?", "Is B?", "Is C?", "Is D?"] * 2
    assert report.asked_singly == 0
    assert [scores.dimensions for scores in report.scores.values()] == [{"style": 100, "text": 100}] * 2


def test_another_wording(small):
    items, root = small
    judge = Saying(lambda *_: "yes\nyes", follows_instructions=True)
    images = find_images(root, "ours", items[:1] + items[1:])
    measure_tiif(items, images, judge, template="Q: ##YNQuestions## !", max_unclear_share=1)
    assert judge.heard[0] == "Q: Is A?\nIs B? !"
    with pytest.raises(ValueError, match="no place for its questions"):
        measure_tiif(items, images, judge, template="Q:")


def test_images_and_items_must_match(small):
    items, root = small
    (root / "style" / "ours" / "long_description" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 images are missing \(style/ours/long_description/1.png\)"):
        find_images(root, "ours", items)
    draw(root, "style", "long", 1, 0)
    draw(root, "text", "short", 7, 0)
    with pytest.raises(DataError, match=r"1 images have no questions \(text/ours/short_description/7.png\)"):
        find_images(root, "ours", items)
    with pytest.raises(DataError, match="there is no such folder of images"):
        find_images(root, "theirs", items)


def test_the_published_questions_are_read():
    items = read_questions(benchmark_data("tiif_testmini_eval_prompts"))
    assert (len(items), sum(len(item.questions) for item in items)) == (277, 1446)
    assert {item.dimension for item in items} == {*DIMENSIONS}
    assert sum(wanted is False for item in items for wanted in item.expected) == 34
