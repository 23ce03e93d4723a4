from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.questions.dpg import (
    corrected_scores,
    measure_dpg,
    published_scores,
    read_questions,
)
from bitdance_scale.evaluation.questions.image_folder import grid_tiles, match_images
from bitdance_scale.evaluation.questions.judge import JudgeError
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


def test_the_file_is_read(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK, ("vrd1", 1, " 0 ", "global - (a photo)")))
    assert questions.prompts["shark"] == "a prompt, with\nshark"
    shark = questions.corrected["shark"]
    assert [(p.number, p.parents, p.category, p.question) for p in shark] == [
        (1, (), "entity - whole", "shark 1?"),
        (2, (1,), "attribute - color", "shark 2?"),
        (3, (2,), "relation - spatial", "shark 3?"),
        (4, (), "attribute - size", "shark 4?"),
    ]
    assert questions.corrected["vrd1"][0].category == "global -"


def test_children_of_a_no_are_no_through_generations(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))
    yes = dict.fromkeys((1, 2, 3, 4), True)
    answers = {"shark": [yes, yes | {1: False}, yes | {2: False}, dict.fromkeys(yes, False)]}
    scores = corrected_scores(questions, answers)
    assert scores.score == pytest.approx(100 * (4 / 4 + 1 / 4 + 2 / 4 + 0) / 4)
    assert scores.prompts == {"shark": scores.score}
    assert published_scores(questions, answers).score == scores.score
    # Of the four images: two sharks, one blue one, one of those to the left, three wide seas.
    assert scores.level_2 == {
        "entity - whole": 50,
        "attribute - color": 25,
        "relation - spatial": 25,
        "attribute - size": 75,
    }
    assert scores.level_1 == {"entity": 50, "attribute": 50, "relation": 25}


def test_two_parents(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("a", 2, "0", "e (y)"), ("a", 3, "1, 2", "r (x, y)")]
    questions = read_questions(write(tmp_path, SKIPPED, *rows))
    answers = {"a": [{1: True, 2: False, 3: True}]}
    assert corrected_scores(questions, answers).score == pytest.approx(100 / 3)
    assert published_scores(questions, answers).score == pytest.approx(100 / 3)


def test_prompts_count_alike(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK, ("b", 1, "0", "entity - whole (b)")))
    answers = {"shark": [dict.fromkeys((1, 2, 3, 4), True)], "b": [{1: False}]}
    assert corrected_scores(questions, answers).score == 50


def test_published_categories_are_those_of_the_last_image_before_zeroing(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))
    yes = dict.fromkeys((1, 2, 3, 4), True)
    answers = {"shark": [dict.fromkeys(yes, False)] * 3 + [yes | {1: False}]}
    published, corrected = published_scores(questions, answers), corrected_scores(questions, answers)
    assert published.score == corrected.score == pytest.approx(100 / 16)
    assert published.level_1 == {"entity": 0, "attribute": 100, "relation": 100}
    assert corrected.level_1 == {"entity": 0, "attribute": 100 / 8, "relation": 0}


def test_published_scores_lack_the_first_row(tmp_path):
    rows = [("a", 1, "0", "entity - whole (x)"), ("a", 2, "0", "entity - whole (y)")]
    questions = read_questions(write(tmp_path, *rows))
    answers = {"a": [{1: False, 2: True}]}
    assert corrected_scores(questions, answers).score == 50
    assert published_scores(questions, answers).score == 100
    # An item of this row alone has no score at all.
    questions = read_questions(
        write(tmp_path, ("a", 1, "0", "entity - whole (x)"), ("b", 1, "0", "entity - whole (y)"))
    )
    answers = {"a": [{1: True}], "b": [{1: False}]}
    published = published_scores(questions, answers)
    assert (published.score, published.left_out) == (0, ("a",))
    assert corrected_scores(questions, answers).score == 50
    alone = published_scores(questions, {"a": [{1: True}]})
    assert math.isnan(alone.score) and alone.left_out == ("a",)


def test_published_scores_lack_the_prompt_that_depends_on_the_first_row(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("a", 2, "0", "e (y)"), ("a", 3, "2,1", "r (x, y)"), ("b", 1, "0", "e (z)")]
    questions = read_questions(write(tmp_path, *rows))
    yes = {1: True, 2: True, 3: True}
    published = published_scores(questions, {"a": [yes], "b": [{1: False}]})
    assert (published.score, published.left_out, published.level_2) == (0, ("a",), {"e": 0})
    assert corrected_scores(questions, {"a": [yes], "b": [{1: False}]}).score == 50
    # Where an earlier parent was answered no, the missing one is not looked at.
    published = published_scores(questions, {"a": [yes | {2: False}], "b": [{1: True}]})
    assert (published.score, published.left_out) == (50, ())


def test_published_scores_zero_in_the_order_of_rows(tmp_path):
    rows = [("a", 3, "2", "e (z)"), ("a", 2, "1", "e (y)"), ("a", 1, "0", "e (x)")]
    questions = read_questions(write(tmp_path, SKIPPED, *rows))
    answers = {"a": [{1: False, 2: True, 3: True}]}
    # 3 still meets the yes of 2.
    assert published_scores(questions, answers).score == pytest.approx(100 / 3)
    assert corrected_scores(questions, answers).score == 0


def test_published_scores_have_the_last_rows_of_an_item_in_two_places(tmp_path):
    rows = [("a", 1, "0", "e (x)"), ("b", 1, "0", "e (y)"), ("a", 2, "0", "e (z)")]
    questions = read_questions(write(tmp_path, SKIPPED, *rows))
    answers = {"a": [{1: False, 2: True}], "b": [{1: True}]}
    assert published_scores(questions, answers).score == 100
    assert corrected_scores(questions, answers).score == 75


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


def draw_grid(path, values):
    """A grid of four images of 2 x 3 pixels, each of one value."""
    tiles = [np.full((2, 3, 3), value, np.uint8) for value in values]
    Image.fromarray(np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])).save(path)


def test_a_benchmark_from_files_to_scores(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))
    folder = tmp_path / "images"
    folder.mkdir()
    draw_grid(folder / "first.png", [5, 5, 5, 6])
    draw_grid(folder / "shark.png", [1, 2, 3, 4])

    def says(pixel, question):
        if question == "first 1?":
            return "yes" if pixel[0] == 5 else "perhaps"
        # Image n shows no more than the first n propositions.
        return "Yes." if int(question.split()[1].rstrip("?")) <= pixel[0] else "no"

    judge = Saying(says)
    images = match_images(folder, list(questions.prompts), str(questions.source))
    report = measure_dpg(questions, images, judge, max_unclear_share=0.1)
    assert len(judge.heard) == 4 * 5
    assert (report.unclear.asked, report.unclear.number, report.unclear.examples) == (
        20,
        1,
        ["'first 1?' -> 'perhaps'"],
    )
    assert report.answers["first"][3] == {1: None}
    assert report.corrected.prompts == {"first": 75, "shark": pytest.approx(62.5)}
    assert report.corrected.score == pytest.approx(68.75)
    assert report.published.score == pytest.approx(62.5) and report.published.left_out == ("first",)
    assert report.corrected.level_2["entity - whole"] == pytest.approx(100 * 7 / 8)
    assert report.published.level_2["entity - whole"] == 100
    with pytest.raises(JudgeError, match="answered 1 of 20 questions"):
        measure_dpg(questions, images, Saying(says), max_unclear_share=0.01)


def test_images_and_ids_must_match(tmp_path):
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).touch()
    assert list(match_images(tmp_path, ["b", "a"], "q.csv")) == ["b", "a"]
    with pytest.raises(DataError, match=r"no images of 4 of the 5 ids in q.csv \(c; d; e; and 1 more\)"):
        match_images(tmp_path, list("acdef"), "q.csv")
    with pytest.raises(DataError, match=r"1 images have no questions in q.csv \(b.jpg\)"):
        match_images(tmp_path, ["a"], "q.csv")
    (tmp_path / "a.webp").touch()
    with pytest.raises(DataError, match=r"a.png and a.webp are both images of a"):
        match_images(tmp_path, ["a", "b"], "q.csv")
    with pytest.raises(DataError, match="there is no such folder"):
        match_images(tmp_path / "none", ["a"], "q.csv")


def test_images_that_are_none_or_no_grid(tmp_path):
    questions = read_questions(write(tmp_path, SKIPPED, *SHARK))
    path = tmp_path / "shark.png"
    path.write_bytes(b"no image")
    judge = Saying(lambda *_: "yes")
    with pytest.raises(DataError, match="shark.png: cannot be read as an image"):
        measure_dpg(questions, {"shark": path}, judge)
    Image.new("RGB", (5, 4)).save(path)
    with pytest.raises(DataError, match="shark.png: has 5 x 4 pixels, which is no grid of 2 x 2 images"):
        measure_dpg(questions, {"shark": path}, judge)
    with pytest.raises(DataError, match="has no questions about item whale"):
        measure_dpg(questions, {"whale": path}, judge)
    assert judge.heard == []


def test_tiles_are_row_by_row(tmp_path):
    draw_grid(tmp_path / "a.png", [1, 2, 3, 4])
    tiles = grid_tiles(np.asarray(Image.open(tmp_path / "a.png")), tmp_path / "a.png")
    assert [(tile.shape, set(tile.flat)) for tile in tiles] == [((2, 3, 3), {n}) for n in (1, 2, 3, 4)]
