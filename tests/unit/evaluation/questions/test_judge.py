from __future__ import annotations

import json

import numpy as np
import pytest

from bitdance_scale.evaluation.questions.judge import JudgeError, KeptAnswers, Unclear, ask_yes_no, yes_or_no
from tests.unit.evaluation.questions.saying import Saying


def image(value: int) -> np.ndarray:
    return np.full((2, 3, 3), value, np.uint8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", True),
        (" Yes.\n", True),
        ("**No**, it is a dog.", False),
        ('"No"', False),
        ("yes - the cat is black", True),
        ("no (there is none)", False),
        ("NO\nThere is no cat.", False),
        ("", None),
        ("no idea", None),
        ("yes and no", None),
        ("yes/no", None),
        ("nothing", None),
        ("yesterday", None),
        ("The answer is yes", None),
        ("2", None),
    ],
)
def test_yes_and_no_are_read_and_nothing_is_guessed(text, said):
    assert yes_or_no(text) is said


def test_answers_are_in_the_order_of_the_questions():
    judge = Saying(lambda pixel, question: f"{pixel[0]} {question}")
    assert judge.answer([image(n) for n in range(5)], list("abcde")) == ["0 a", "1 b", "2 c", "3 d", "4 e"]
    with pytest.raises(ValueError, match="zip"):
        judge.answer([image(0)], ["a", "b"])


def test_a_judge_that_follows_instructions_is_told_to_answer_with_one_word():
    judges = [Saying(lambda *_: "yes", follows) for follows in (False, True)]
    for judge in judges:
        assert ask_yes_no(judge, [(image(0), "Is it black?  ")], Unclear("a-judge")) == [True]
    assert [judge.heard for judge in judges] == [["Is it black?"], ["Is it black? Answer with one word, yes or no."]]


def test_too_many_unclear_answers_are_an_error_with_share_and_examples():
    judge = Saying(lambda pixel, question: "a dog" if question == "q3" else "no")
    unclear = Unclear(judge.model, max_share=0.05)
    said = ask_yes_no(judge, [(image(0), f"q{n}") for n in range(10)], unclear)
    assert said == [False] * 3 + [None] + [False] * 6
    with pytest.raises(
        JudgeError, match=r"a-judge: answered 1 of 10 questions \(10.0%\).*at most 5.0%.*'q3' -> 'a dog'"
    ):
        unclear.check()
    unclear.max_share = 0.1
    unclear.check()


def test_a_judge_that_never_says_yes_or_no_is_stopped_early():
    judge = Saying(lambda *_: "a dog")
    with pytest.raises(JudgeError, match="answered 100 of 100 questions"):
        ask_yes_no(judge, ((image(0), "?") for _ in range(10_000)), Unclear("a-judge"))
    assert len(judge.heard) < 110


def test_kept_answers_are_not_asked_again(tmp_path):
    path = tmp_path / "kept" / "answers.jsonl"
    judge = Saying(lambda pixel, question: f"{pixel[0]} {question} \u00e9\ud83d")
    images, questions = [image(0), image(1), image(1)], ["a", "a", "b\nc"]
    with KeptAnswers(judge, path) as kept:
        first = kept.answer(images, questions)
        assert kept.num_asked == 3
    with KeptAnswers(judge, path) as kept:
        # One of a new question amid known ones.
        assert kept.answer([*images, image(1), images[0]], [*questions, "d", "a"]) == [
            *first,
            "1 d \u00e9\ud83d",
            first[0],
        ]
        assert kept.num_asked == 1
    assert len(judge.heard) == 4
    record = json.loads(path.read_text("utf-8", "surrogatepass").splitlines()[0])
    assert set(record) == {"image", "question", "model", "protocol", "answer"}


@pytest.mark.parametrize("change", ["pixel", "shape", "question", "model", "protocol"])
def test_what_makes_another_answer(tmp_path, change):
    judge = Saying(lambda *_: "yes")
    with KeptAnswers(judge, tmp_path / "a.jsonl") as kept:
        kept.answer([image(0)], ["a"])
    shown, question = image(0), "a"
    if change == "pixel":
        shown[1, 2, 2] = 1
    elif change == "shape":
        shown = shown.reshape(3, 2, 3)
    elif change == "question":
        question = "b"
    else:
        setattr(judge, change, "another")
    with KeptAnswers(judge, tmp_path / "a.jsonl") as kept:
        kept.answer([shown], [question])
        assert kept.num_asked == 1


def test_answers_before_an_error_are_kept_and_a_torn_line_is_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"

    def says(pixel, question):
        if question == "e":
            raise JudgeError("gone")
        return "yes"

    with pytest.raises(JudgeError, match="gone"), KeptAnswers(Saying(says), path) as kept:
        kept.answer([image(0)] * 5, list("abcde"))
    content = path.read_bytes()
    assert content.count(b"\n") == 3
    # Killed amid the third line.
    path.write_bytes(content[:-9])
    judge = Saying(lambda *_: "no")
    with KeptAnswers(judge, path) as kept:
        said = kept.answer([image(0)] * 3, list("abc"))
    # Three answers arrive in reverse order.
    assert (said, judge.heard) == (["no", "yes", "yes"], ["a"])
    with KeptAnswers(judge, path) as kept:
        assert kept.answer([image(0)] * 3, list("abc")) == said
        assert kept.num_asked == 0


@pytest.mark.parametrize("content", ['{"prompt": "a"}\n', "some\ntext\nof somebody\n", "[1]\n"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(JudgeError, match=r"notes.txt.*name another file"):
        KeptAnswers(Saying(lambda *_: "yes"), path)
    assert path.read_text(encoding="utf-8") == content
