from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.catalogue import DPG
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.questions.dpg import ask_dpg, image_scores, published_scores, read_questions
from bitdance_scale.evaluation.questions.judge import JudgeError, Unclear
from tests.unit.evaluation.questions.saying import Saying

COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)


def write(tmp_path, *rows: tuple[str, int | str, str, str], columns=COLUMNS):
    """A file of questions of rows (item, proposition, dependency, tuple)."""
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(columns)
    for item, number, dependency, words in rows:
        values = {
            "item_id": item,
            "text": f"a prompt, with\n{item}",
            "proposition_id": number,
            "dependency": dependency,
            "tuple": words,
            "question_natural_language": f"{item} {number}?",
        }
        writer.writerow([values.get(name, "") for name in columns])
    path = tmp_path / "dpg_bench.csv"
    path.write_text(content.getvalue(), encoding="utf-8")
    return path


# The row that the published script skips.
SKIPPED = ("first", 1, "0", "entity - whole (sun)")
SHARK = (
    ("shark", 1, "0", "entity - whole (shark)"),
    ("shark", 2, "1", "attribute - color (shark, blue)"),
    ("shark", 3, "2", "relation - spatial (shark, left)"),
    ("shark", 4, "0", "attribute - size (sea, wide)"),
)


def corrected(questions, answers):
    """The values of the metric by name."""
    images = image_scores(questions, answers, dict.fromkeys(answers, "source"))
    return {name: found.value for name, found in estimates(images, DPG.combine).items()}


def test_the_file_is_read(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK, ("vrd1", 1, " 0 ", "global - (a photo)")))
    assert questions.prompts["shark"] == "a prompt, with\nshark"
    shark = questions.propositions["shark"]
    assert [(p.number, p.parents, p.category, p.question) for p in shark] == [
        (1, (), "entity - whole", "shark 1?"),
        (2, (1,), "attribute - color", "shark 2?"),
        (3, (2,), "relation - spatial", "shark 3?"),
        (4, (), "attribute - size", "shark 4?"),
    ]
    assert questions.propositions["vrd1"][0].category == "global -"


def test_children_of_a_no_are_no_through_generations(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))
    yes = dict.fromkeys((1, 2, 3, 4), True)
    answers = {"shark": [yes, yes | {1: False}, yes | {2: False}, dict.fromkeys(yes, False)]}
    scores = corrected(questions, answers)
    assert scores[OVERALL] == pytest.approx((4 / 4 + 1 / 4 + 2 / 4 + 0) / 4)
    assert published_scores(questions, answers).score == scores[OVERALL]
    # Of the four images: two sharks, one blue one, one of those to the left, three wide seas.
    assert list(scores.items())[1:] == [
        ("attribute", 0.5),
        ("attribute - color", 0.25),
        ("attribute - size", 0.75),
        ("entity", 0.5),
        ("entity - whole", 0.5),
        ("relation", 0.25),
        ("relation - spatial", 0.25),
    ]
    images = image_scores(questions, answers, {"shark": "source"})
    assert [(image.k, image.category, image.value) for image in images] == [
        (k, "source", value) for k, value in enumerate((1, 0.25, 0.5, 0))
    ]
    assert images[2].reason == "shark 2? no; shark 3? no, as what it depends on is not there"
    assert images[0].reason == ""


def test_two_parents(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("a", 2, "0", "e (y)"), ("a", 3, "1, 2", "r (x, y)")]
    questions = read_questions(write(tmp_path, SKIPPED, *rows))
    answers = {"a": [{1: True, 2: False, 3: True}]}
    assert corrected(questions, answers)[OVERALL] == pytest.approx(1 / 3)
    assert published_scores(questions, answers).score == pytest.approx(1 / 3)


def test_prompts_count_alike(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK, ("b", 1, "0", "entity - whole (b)")))
    answers = {"shark": [dict.fromkeys((1, 2, 3, 4), True)], "b": [{1: False}]}
    assert corrected(questions, answers)[OVERALL] == 0.5


def test_published_categories_are_those_of_the_last_image_before_zeroing(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))
    yes = dict.fromkeys((1, 2, 3, 4), True)
    answers = {"shark": [dict.fromkeys(yes, False)] * 3 + [yes | {1: False}]}
    published, ours = published_scores(questions, answers), corrected(questions, answers)
    assert published.score == ours[OVERALL] == pytest.approx(1 / 16)
    assert published.level_1 == {"entity": 0, "attribute": 1, "relation": 1}
    assert published.level_2["attribute - color"] == 1
    assert {name: ours[name] for name in published.level_1} == {"entity": 0, "attribute": 1 / 8, "relation": 0}


def test_published_scores_lack_the_first_row(tmp_path):
    rows = [("a", 1, "0", "entity - whole (x)"), ("a", 2, "0", "entity - whole (y)")]
    questions = read_questions(write(tmp_path, *rows))
    answers = {"a": [{1: False, 2: True}]}
    assert corrected(questions, answers)[OVERALL] == 0.5
    assert published_scores(questions, answers).score == 1
    # An item of this row alone has no score at all.
    questions = read_questions(
        write(tmp_path, ("a", 1, "0", "entity - whole (x)"), ("b", 1, "0", "entity - whole (y)"))
    )
    answers = {"a": [{1: True}], "b": [{1: False}]}
    published = published_scores(questions, answers)
    assert (published.score, published.left_out) == (0, ("a",))
    assert corrected(questions, answers)[OVERALL] == 0.5
    alone = published_scores(questions, {"a": [{1: True}]})
    assert math.isnan(alone.score) and alone.left_out == ("a",)


def test_published_scores_lack_the_prompt_that_depends_on_the_first_row(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("a", 2, "0", "e (y)"), ("a", 3, "2,1", "r (x, y)"), ("b", 1, "0", "e (z)")]
    questions = read_questions(write(tmp_path, *rows))
    yes = {1: True, 2: True, 3: True}
    published = published_scores(questions, {"a": [yes], "b": [{1: False}]})
    assert (published.score, published.left_out, published.level_2) == (0, ("a",), {"e": 0})
    assert corrected(questions, {"a": [yes], "b": [{1: False}]})[OVERALL] == 0.5
    # Where an earlier parent was answered no, the missing one is not looked at.
    published = published_scores(questions, {"a": [yes | {2: False}], "b": [{1: True}]})
    assert (published.score, published.left_out) == (0.5, ())


def test_published_scores_zero_in_the_order_of_rows(tmp_path):
    rows = [("a", 3, "2", "e (z)"), ("a", 2, "1", "e (y)"), ("a", 1, "0", "e (x)")]
    questions = read_questions(write(tmp_path, SKIPPED, *rows))
    answers = {"a": [{1: False, 2: True, 3: True}]}
    # 3 still meets the yes of 2.
    assert published_scores(questions, answers).score == pytest.approx(1 / 3)
    assert corrected(questions, answers)[OVERALL] == 0


def test_published_scores_have_the_last_rows_of_an_item_in_two_places(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("b", 1, "0", "e (y)"), ("a", 2, "0", "e (z)")]
    questions = read_questions(write(tmp_path, SKIPPED, *rows))
    answers = {"a": [{1: False, 2: True}], "b": [{1: True}]}
    assert published_scores(questions, answers).score == 1
    assert corrected(questions, answers)[OVERALL] == 0.75


def test_unequal_dependencies_that_lead_back_are_refused(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("a", 2, "3", "e (y)"), ("a", 3, "2", "e (z)")]
    with pytest.raises(
        DataError, match=r"propositions 2, 3 of item a \(from line \d+\) depend on themselves in a cycle"
    ):
        read_questions(write(tmp_path, *rows))
    with pytest.raises(DataError, match="propositions 1 of item a .* depend on themselves"):
        read_questions(write(tmp_path, ("a", 1, "1", "e (x)")))


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            ("a", 2, "7", "e (x)"),
            r"line \d+ depends on proposition 7, which item a does not have; its propositions are 1, 2",
        ),
        (("a", 1, "0", "e (x)"), r"lines \d+ and \d+ both are proposition 1 of item a"),
        (("a", "one", "0", "e (x)"), r"line \d+ has proposition_id 'one' and dependency '0', expected a number"),
        (("a", 2, "1;2", "e (x)"), r"line \d+ has proposition_id '2' and dependency '1;2'"),
        ((" ", 2, "0", "e (x)"), r"line \d+ has no item_id"),
    ],
)
def test_rows_against_the_rules(tmp_path, row, match):
    with pytest.raises(DataError, match=f"dpg_bench.csv: {match}"):
        read_questions(write(tmp_path, ("a", 1, "0", "e (x)"), row))


def test_other_files_are_refused(tmp_path):
    path = write(tmp_path, columns=("category", "id", "prompt"))
    with pytest.raises(
        DataError, match="has no column item_id, text.*but category, id, prompt; name dpg_bench.csv of DPG-Bench"
    ):
        read_questions(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="has no column item_id"):
        read_questions(path)
    with pytest.raises(DataError, match="has no rows"):
        read_questions(write(tmp_path))
    path.write_text(f"{','.join(COLUMNS)}\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 has too few columns"):
        read_questions(path)
    with pytest.raises(DataError, match="there is no such file"):
        read_questions(tmp_path / "none.csv")


def shown(**values):
    """Items with images of 2 x 3 pixels, each of one value."""
    return [(item, [np.full((2, 3, 3), value, np.uint8) for value in found]) for item, found in values.items()]


def test_from_images_to_scores(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))

    def says(pixel, question):
        if question == "first 1?":
            return "yes" if pixel[0] == 5 else "perhaps"
        # Image n shows no more than the first n propositions.
        return "Yes." if int(question.split()[1].rstrip("?")) <= pixel[0] else "no"

    judge = Saying(says)
    unclear = Unclear("a-judge", 0.1)
    answers = ask_dpg(questions, shown(first=[5, 5, 5, 6], shark=[1, 2, 3, 4]), judge, unclear)
    assert len(judge.heard) == 4 * 5
    assert (unclear.asked, unclear.number, unclear.examples) == (20, 1, ["'first 1?' -> 'perhaps'"])
    assert answers["first"][3] == {1: None}
    scores = image_scores(questions, answers, {"first": "one", "shark": "two"})
    assert [image.value for image in scores] == [1, 1, 1, 0, 1 / 4, 2 / 4, 3 / 4, 1]
    assert scores[3].reason == "first 1? unclear"
    ours, published = corrected(questions, answers), published_scores(questions, answers)
    assert ours[OVERALL] == pytest.approx(0.6875)
    assert published.score == pytest.approx(0.625) and published.left_out == ("first",)
    assert ours["entity - whole"] == pytest.approx(7 / 8)
    assert published.level_2["entity - whole"] == 1
    with pytest.raises(JudgeError, match="answered 1 of 20 questions"):
        images = shown(first=[5, 5, 5, 6], shark=[1, 2, 3, 4])
        ask_dpg(questions, images, Saying(says), Unclear("a-judge", 0.01))


def test_a_category_without_a_dash_is_one_part(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, ("a", 1, "0", "global (x)"), ("a", 2, "0", "global - (y)")))
    (image,) = image_scores(questions, {"a": [{1: True, 2: False}]}, {"a": ""})
    assert image.parts == {OVERALL: (0.5, 1), "global": (1, 2), "global -": (0, 1)}
