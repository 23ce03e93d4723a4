from __future__ import annotations

import json

import numpy as np
import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.catalogue import TIIF
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.questions.judge import JudgeError, Unclear
from bitdance_scale.evaluation.questions.tiif import (
    ADVANCED_GROUPS,
    BASIC_GROUPS,
    DIMENSIONS,
    GROUPS,
    TiifItem,
    answer_lines,
    ask_tiif,
    image_scores,
    items_by_prompt,
    missing_dimensions,
    read_questions,
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


def values_of(items, answers):
    return {name: one.value for name, one in estimates(image_scores(items, answers), TIIF.combine).items()}


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
    # One item of one question per dimension, answered right; but for three dimensions of the short prompts.
    items = [TiifItem(name, 0, ("?",), (True,)) for name in DIMENSIONS if name != "numeracy"]
    items += [TiifItem("numeracy", 0, ("?",) * 3, (True, False, True)), TiifItem("numeracy", 1, ("?",), (False,))]
    by_prompt = items_by_prompt(items)
    answers = {prompt_id: item.expected for prompt_id, item in by_prompt.items()}
    answers |= {"numeracy/short_description/0": [True, False, None], "numeracy/short_description/1": [True]}
    answers["text/short_description/0"] = answers["shape+2d/short_description/0"] = [False]
    found = values_of(by_prompt, answers)
    assert found["short: numeracy"] == 0.5
    assert found["short: reasoning"] == pytest.approx(3.5 / 4)
    assert found["short: attribute+relation"] == pytest.approx(7 / 8)
    assert (found["short: text"], found["short: style"]) == (0, 1)
    assert found["short: basic"] == pytest.approx(11.5 / 12)
    assert found["short: advanced"] == pytest.approx(24 / 26)
    assert found["short: overall"] == pytest.approx((6 + 0 + 0.875 + 0.875) / 9)
    assert {value for name, value in found.items() if name.startswith("long")} == {1}
    assert found[OVERALL] == pytest.approx((found["short: overall"] + 1) / 2)
    assert list(found)[:5] == [OVERALL, "short: overall", "short: basic", "short: advanced", "short: attribute"]
    assert missing_dimensions(by_prompt) == []


def test_both_prompts_of_an_item_are_one_observation():
    # Answers of the short and the long prompt are the same; one item in three is answered wrong.
    items = [TiifItem(name, index, ("?",), (True,)) for name in ("style", "text") for index in range(9)]
    by_prompt = items_by_prompt(items)
    answers = {prompt_id: [item.index % 3 > 0] for prompt_id, item in by_prompt.items()}
    found = estimates(image_scores(by_prompt, answers), TIIF.combine)
    assert found[OVERALL].high > found[OVERALL].low
    assert vars(found[OVERALL]) == vars(found["short: overall"]) == vars(found["long: overall"])


def test_what_has_no_prompts_is_left_out():
    by_prompt = items_by_prompt([TiifItem("shape+color", 0, ("A?", "B?"), (True, True))])
    found = values_of(by_prompt, {"shape+color/long_description/0": [True, None]})
    assert found == {OVERALL: 0.5} | dict.fromkeys(
        [f"long: {name}" for name in ("overall", "basic", "attribute", "shape+color")], 0.5
    )
    (image,) = image_scores(by_prompt, {"shape+color/long_description/0": [True, None]})
    assert (image.category, image.value, image.reason) == ("long: shape+color", 0.5, "B? neither")
    assert missing_dimensions(by_prompt) == [name for name in DIMENSIONS if name != "shape+color"]


@pytest.fixture
def small(tmp_path):
    """Two dimensions with 2 + 1 items, and a function that gives their images, which say which they are."""
    questions = write(
        tmp_path / "questions",
        style=f"{line(questions=('Is A?', 'Is B?'), answers=('yes', 'no'))}\n{line(questions=('Is C?',))}",
        text=line("text", questions=("Is D?",)),
    )
    items = items_by_prompt(read_questions(questions))
    values = dict(zip(items, (1, 2, 3, 101, 102, 103), strict=True))

    def images(ids):
        for prompt_id in ids:
            yield prompt_id, np.full((2, 2, 3), values[prompt_id], np.uint8)

    return items, images


def test_one_request_for_all_questions_of_an_image(small):
    items, images = small

    def says(pixel, question):
        if "Answer with one word" in question:
            return {"Is A?": "Yes.", "Is B?": "hm"}[question[:5]]
        # Two answers for the first image of the short prompts, one for that of the long ones.
        return {1: "yes, clearly\nno, not at all", 101: "yes"}.get(pixel[0], "no" if pixel[0] == 3 else "yes")

    judge, unclear = Saying(says, follows_instructions=True), Unclear("a-judge", 0.2)
    said = ask_tiif(items, images, judge, unclear)
    assert len(judge.heard) == 6 + 2
    assert judge.heard[0].count("Is A?\nIs B?") == 1 and "##" not in judge.heard[0]
    assert said.answers["style/short_description/0"] == [True, False]
    assert said.answers["style/long_description/0"] == [True, None]
    assert (said.asked_singly, unclear.asked, unclear.number) == (1, 8, 1)
    found = values_of(items, said.answers)
    assert (found["short: style"], found["short: text"]) == (1, 0)
    assert (found["long: style"], found["long: text"]) == (pytest.approx(2 / 3), 1)
    with pytest.raises(JudgeError, match="answered 1 of 8 questions"):
        ask_tiif(items, images, judge, Unclear("a-judge", 0.05))


def test_a_judge_of_single_questions_is_asked_them(small):
    items, images = small
    judge = Saying(lambda pixel, question: "no" if question == "Is B?" else "yes")
    said = ask_tiif(items, images, judge, Unclear("a-judge"))
    assert judge.heard == ["Is A?", "Is B?", "Is C?", "Is D?"] * 2
    assert said.asked_singly == 0
    assert {*values_of(items, said.answers).values()} == {1}


def test_another_wording(small):
    items, images = small
    judge = Saying(lambda *_: "yes\nyes", follows_instructions=True)
    ask_tiif(items, images, judge, Unclear("a-judge", 1), template="Q: ##YNQuestions## !")
    assert judge.heard[0] == "Q: Is A?\nIs B? !"
    with pytest.raises(ValueError, match="no place for its questions"):
        ask_tiif(items, images, judge, Unclear("a-judge"), template="Q:")


def test_the_published_questions_are_read():
    items = read_questions(benchmark_data("tiif_testmini_eval_prompts"))
    assert (len(items), sum(len(item.questions) for item in items)) == (277, 1446)
    assert {item.dimension for item in items} == {*DIMENSIONS}
    assert sum(wanted is False for item in items for wanted in item.expected) == 34
    one = read_questions(benchmark_data("tiif_testmini_eval_prompts") / "style_eval_prompts.jsonl")
    assert {item.dimension for item in one} == {"style"}
