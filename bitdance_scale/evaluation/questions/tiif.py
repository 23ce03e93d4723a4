"""TIIF-Bench (Wei et al., arXiv 2506.02161): yes/no questions with known answers, on a short and a long prompt each.

Checked against github.com/A113N-W3I/TIIF-Bench by copies of its `eval/eval_with_vlm.py`, `eval/summary_results.py` (in
Chikit-WONG/TIIF-Bench) and `eval/summary_dimension_results.py` (in cedric-scheerlinck/TIIF-Bench): all questions of an
image are one request; of the answer, the lines that begin with the word yes or no count, in order, and there must be as
many as questions. A dimension's score is the share of right answers over all its questions. Nine groups of dimensions
have the mean of their dimensions; the overall score is the mean of the groups, that of basic and advanced following the
mean of their dimensions. Short and long prompts are kept apart.

The published script draws one of three wordings and a temperature of 1, and asks again until the number of lines is
right. Here there is one wording (`template` takes a published one) and temperature 0, and an answer of another number
of lines is followed by each question on its own, as is everything with a judge that follows no instructions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.questions.judge import Asked, Judge, Unclear, ask_yes_no
from bitdance_scale.text_files import read_utf8, split_lines
from bitdance_scale.wording import first_few

LENGTHS: Mapping[str, str] = {"short": "short_description", "long": "long_description"}
"""Kinds of prompts, and their folders."""
PLACE_OF_QUESTIONS = "##YNQuestions##"
TEMPLATE = f"""Look at the image closely. Then answer these questions about it:

{PLACE_OF_QUESTIONS}

Write one line per question, in the order of the questions and nothing else. Begin each line with "yes" or "no" and add
the reason in a few words."""
SYSTEM = "You are a professional image critic."
"""The published system message; an endpoint's `system` takes it."""
_COMPLEX = tuple(product(("numeracy", "comparison", "differentiation", "negation"), ("color", "texture", "2d", "3d")))
BASIC_GROUPS: Mapping[str, tuple[str, ...]] = {
    "attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "reasoning": ("numeracy", "negation", "differentiation", "comparison"),
}
"""Dimensions of basic following."""
ADVANCED_GROUPS: Mapping[str, tuple[str, ...]] = {
    "attribute+relation": (
        *("action+color", "action+texture", "color+2d", "color+3d"),
        *("shape+2d", "shape+3d", "texture+2d", "texture+3d"),
    ),
    "attribute+reasoning": tuple(f"{first}+{second}" for first, second in _COMPLEX if not second.endswith("d")),
    "relation+reasoning": tuple(f"{first}+{second}" for first, second in _COMPLEX if second.endswith("d")),
    "text": ("text",),
    "style": ("style",),
}
"""Dimensions of advanced following."""
GROUPS: Mapping[str, tuple[str, ...]] = {**BASIC_GROUPS, **ADVANCED_GROUPS, "real world": ("real_world",)}
"""The nine groups."""
DIMENSIONS = tuple(dimension for group in GROUPS.values() for dimension in group)
_ANSWER_LINE = re.compile(r"(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class TiifItem:
    """The questions on one prompt.

    Attributes:
        dimension: what it tests.
        index: its line in the file of the dimension, from 0.
        questions: the questions.
        expected: the right answers, True for yes.
    """

    dimension: str
    index: int
    questions: tuple[str, ...]
    expected: tuple[bool, ...]


@dataclass(frozen=True)
class TiifAnswers:
    """What a judge said.

    Attributes:
        answers: by prompt id; None for neither yes nor no, which counts as wrong.
        asked_singly: number of images whose answer had another number of lines than there were questions.
    """

    answers: Mapping[str, Sequence[bool | None]]
    asked_singly: int


def read_questions(source: Path) -> list[TiifItem]:
    """Reads the jsonl files of a folder such as `data/testmini_eval_prompts`, or one such file.

    Raises:
        DataError: there are none, or a line is against the rules; names file and line.
    """
    paths = [source] if source.is_file() else sorted(source.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{source}: has no .jsonl files; name the folder data/testmini_eval_prompts of TIIF-Bench")
    items: list[TiifItem] = []
    homes: dict[str, Path] = {}
    for path in paths:
        try:
            lines = [(number, line) for number, line in enumerate(split_lines(read_utf8(path)), 1) if line.strip()]
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        if not lines:
            raise DataError(f"{path}: is empty; download it again")
        found = [_read_line(line, index, f"{path}: line {number}") for index, (number, line) in enumerate(lines)]
        other = [item.dimension for item in found if item.dimension != found[0].dimension]
        if other:
            raise DataError(f"{path}: holds types {found[0].dimension} and {other[0]}; a file has one, as images have")
        if (home := homes.setdefault(found[0].dimension, path)) != path:
            raise DataError(f"{path}: has the type {found[0].dimension}, as {home} has; keep one of them")
        items += found
    return items


def _read_line(line: str, index: int, where: str) -> TiifItem:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error}); download the file again") from error
    if not isinstance(record, dict) or not {"type", "yn_question_list", "yn_answer_list"} <= record.keys():
        raise DataError(
            f"{where}: has no type, yn_question_list and yn_answer_list; name the files of questions "
            "(testmini_eval_prompts), not those of prompts"
        )
    dimension, questions, answers = (record[name] for name in ("type", "yn_question_list", "yn_answer_list"))
    if dimension not in DIMENSIONS:
        raise DataError(f"{where}: has the type {dimension!r}, which is none of TIIF-Bench: {', '.join(DIMENSIONS)}")
    lists = (questions, answers)
    if not all(isinstance(part, list) and all(isinstance(text, str) for text in part) for part in lists):
        raise DataError(f"{where}: yn_question_list and yn_answer_list must be lists of texts")
    if not questions or len(questions) != len(answers):
        raise DataError(f"{where}: has {len(questions)} questions and {len(answers)} answers; each needs the other")
    expected = [text.strip().lower() for text in answers]
    odd = [text for text, word in zip(answers, expected, strict=True) if word not in ("yes", "no")]
    if odd:
        raise DataError(f"{where}: has the answer {odd[0]!r}, expected yes or no")
    stripped = tuple(text.strip() for text in questions)
    return TiifItem(dimension, index, stripped, tuple(word == "yes" for word in expected))


def items_by_prompt(items: Sequence[TiifItem]) -> dict[str, TiifItem]:
    """The items by the ids of their prompts, of which each has a short and a long one."""
    return {f"{item.dimension}/{folder}/{item.index}": item for folder in LENGTHS.values() for item in items}


def answer_lines(text: str, number: int) -> list[bool] | None:
    """The answers in a text of several lines, by the published rule; None unless there are `number` of them.

    Lines that begin with the word yes or no are answers, others are passed over.
    """
    words = [_ANSWER_LINE.match(line.strip()) for line in text.split("\n")]
    said = [word[1].lower() == "yes" for word in words if word is not None]
    return said if len(said) == number else None


def ask_tiif(
    items: Mapping[str, TiifItem],
    images: Callable[[Sequence[str]], Iterable[tuple[str, np.ndarray]]],
    judge: Judge,
    unclear: Unclear,
    template: str = TEMPLATE,
) -> TiifAnswers:
    """Asks a judge about all images.

    Args:
        items: by prompt id.
        images: of prompt ids, each with its image uint8 [H, W, 3], in any order; read as they are needed.
        judge: who is asked.
        unclear: counts the answers; its limit is checked here.
        template: wording of a request, with `PLACE_OF_QUESTIONS` where the questions are put, one a line.

    Raises:
        JudgeError: the judge cannot be asked, or too many of its answers are unclear.
        ValueError: the template has no place for the questions.
    """
    if PLACE_OF_QUESTIONS not in template:
        raise ValueError(f"the wording of a request has no place for its questions, {PLACE_OF_QUESTIONS}")
    answers: dict[str, Sequence[bool | None]] = {}
    if judge.follows_instructions:
        together: list[str] = []

        def all_at_once() -> Iterator[Asked]:
            for prompt_id, image in images([*items]):
                together.append(prompt_id)
                yield image, template.replace(PLACE_OF_QUESTIONS, "\n".join(items[prompt_id].questions))

        for place, text in judge.stream(all_at_once()):
            number = len(items[together[place]].questions)
            lines = answer_lines(text, number)
            if lines is not None:
                answers[together[place]] = lines
                unclear.asked += number
    left = [prompt_id for prompt_id in items if prompt_id not in answers]
    singly: list[str] = []

    def one_by_one() -> Iterator[Asked]:
        for prompt_id, image in images(left):
            singly.append(prompt_id)
            for question in items[prompt_id].questions:
                yield image, question

    said = iter(ask_yes_no(judge, one_by_one(), unclear) if left else ())
    answers |= {prompt_id: [next(said) for _ in items[prompt_id].questions] for prompt_id in singly}
    unclear.check()
    return TiifAnswers(answers, len(left) if judge.follows_instructions else 0)


def image_scores(items: Mapping[str, TiifItem], answers: Mapping[str, Sequence[bool | None]]) -> list[ImageScore]:
    """Scores of images: the share of right answers, which is a part such as "short: action+2d".

    The short and the long prompt of an item are one unit, as they have its questions.

    Args:
        items: by prompt id.
        answers: by prompt id.
    """
    lengths = {folder: length for length, folder in LENGTHS.items()}
    words = {True: "yes", False: "no", None: "neither"}
    scores = []
    for prompt_id, said in answers.items():
        item = items[prompt_id]
        name = f"{lengths[prompt_id.split('/')[1]]}: {item.dimension}"
        asked = list(zip(item.questions, said, item.expected, strict=True))
        wrong = [f"{question} {words[answer]}" for question, answer, wanted in asked if answer is not wanted]
        right = float(len(asked) - len(wrong))
        parts = {name: (right, float(len(asked)))}
        unit = f"{item.dimension}/{item.index}"
        scores.append(ImageScore(prompt_id, 0, name, right / len(asked), parts, first_few(wrong), unit))
    return scores


def combine(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of the metric from the shares of right answers per length and dimension.

    For short and for long prompts, with the length and a colon before each name: "overall", the mean of the groups;
    "basic" and "advanced", the mean of their dimensions; the groups, each the mean of its dimensions; the dimensions.
    What has no dimension at all is left out. The value that the metric is quoted by is the mean of the overall values
    of short and long prompts, since published tables have both and no one number.
    """
    values: dict[str, np.ndarray] = {}
    for length in LENGTHS:
        found = {name: parts[key] for name in DIMENSIONS if (key := f"{length}: {name}") in parts}
        groups = _means(found, GROUPS)
        halves = {"basic": BASIC_GROUPS, "advanced": ADVANCED_GROUPS}
        of_halves = {half: [name for names in group.values() for name in names] for half, group in halves.items()}
        means = _means(groups, {OVERALL: [*groups]}) | _means(found, of_halves) | groups | found
        values |= {f"{length}: {name}": value for name, value in means.items()}
    lengths = [values[key] for length in LENGTHS if (key := f"{length}: {OVERALL}") in values]
    return {OVERALL: np.mean(lengths, axis=0), **values}


def _means(values: Mapping[str, np.ndarray], members: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """The mean of the members of each name that are there; a name without any is left out."""
    found = {name: [values[one] for one in ones if one in values] for name, ones in members.items()}
    return {name: np.mean(rows, axis=0) for name, rows in found.items() if rows}


def missing_dimensions(items: Mapping[str, TiifItem]) -> list[str]:
    """Dimensions without prompts: with any of these the scores are not comparable with published ones."""
    found = {item.dimension for item in items.values()}
    return [name for name in DIMENSIONS if name not in found]
