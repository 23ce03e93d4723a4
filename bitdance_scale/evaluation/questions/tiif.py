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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.questions.image_folder import images_by_name, read_rgb
from bitdance_scale.evaluation.questions.judge import MAX_UNCLEAR_SHARE, Asked, Judge, Unclear, ask_yes_no
from bitdance_scale.text_files import read_utf8
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
class TiifScores:
    """Scores on prompts of one length, 0 to 100.

    Attributes:
        dimensions: share of right answers.
        groups: mean of the dimensions of each group that has any.
        basic, advanced: mean of their dimensions; None where there are none.
        overall: mean of the nine groups; None where one has no dimension.
    """

    dimensions: Mapping[str, float]
    groups: Mapping[str, float]
    basic: float | None
    advanced: float | None
    overall: float | None


@dataclass(frozen=True)
class TiifReport:
    """Scores, and how sure the judge was.

    Attributes:
        scores: by length.
        unclear: how many questions had an answer that was neither yes nor no, with examples. It counts as wrong.
        asked_singly: number of images whose answer had another number of lines than there were questions.
        answers: what the judge said, by length, dimension and index; None for neither.
    """

    scores: Mapping[str, TiifScores]
    unclear: Unclear
    asked_singly: int
    answers: Mapping[tuple[str, str, int], Sequence[bool | None]]


def read_questions(folder: Path) -> list[TiifItem]:
    """Reads the jsonl files of a folder such as `data/testmini_eval_prompts`.

    Raises:
        DataError: there are none, or a line is against the rules; names file and line.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{folder}: has no .jsonl files; name the folder data/testmini_eval_prompts of TIIF-Bench")
    items: list[TiifItem] = []
    homes: dict[str, Path] = {}
    for path in paths:
        try:
            lines = [(number, line) for number, line in enumerate(read_utf8(path).split("\n"), 1) if line.strip()]
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


def find_images(root: Path, model: str, items: Sequence[TiifItem]) -> dict[tuple[str, str, int], Path]:
    """Images by length, dimension and index, in the layout of the benchmark's own scorer.

    Args:
        root: holds `{dimension}/{model}/{short_description,long_description}/{index}.png`.
        model: the folder's name of the model that drew them.
        items: the questions.

    Raises:
        DataError: an item has no image, or an image no item.
    """
    found: dict[tuple[str, str, int], Path] = {}
    missing: list[str] = []
    unknown: list[str] = []
    for length, dimension in product(LENGTHS, dict.fromkeys(item.dimension for item in items)):
        folder = root / dimension / model / LENGTHS[length]
        images = images_by_name(folder)
        wanted = {str(item.index): item for item in items if item.dimension == dimension}
        missing += [f"{folder.relative_to(root)}/{name}.png" for name in wanted if name not in images]
        unknown += [str(path.relative_to(root)) for name, path in images.items() if name not in wanted]
        found |= {(length, dimension, wanted[name].index): images[name] for name in wanted if name in images}
    if missing:
        raise DataError(f"{root}: {len(missing)} images are missing ({first_few(missing)}); draw them first")
    if unknown:
        raise DataError(
            f"{root}: {len(unknown)} images have no questions ({first_few(unknown)}); the index of an image is the "
            "line of its questions, from 0"
        )
    return found


def answer_lines(text: str, number: int) -> list[bool] | None:
    """The answers in a text of several lines, by the published rule; None unless there are `number` of them.

    Lines that begin with the word yes or no are answers, others are passed over.
    """
    words = [_ANSWER_LINE.match(line.strip()) for line in text.split("\n")]
    said = [word[1].lower() == "yes" for word in words if word is not None]
    return said if len(said) == number else None


def measure_tiif(
    items: Sequence[TiifItem],
    images: Mapping[tuple[str, str, int], Path],
    judge: Judge,
    template: str = TEMPLATE,
    max_unclear_share: float = MAX_UNCLEAR_SHARE,
) -> TiifReport:
    """Asks a judge about all images, and scores what it says.

    Args:
        items: the questions.
        images: as `find_images`.
        judge: who is asked.
        template: wording of a request, with `PLACE_OF_QUESTIONS` where the questions are put, one a line.
        max_unclear_share: share of answers that may be neither yes nor no.

    Raises:
        DataError: an image cannot be read.
        JudgeError: the judge cannot be asked, or too many of its answers are unclear.
        ValueError: the template has no place for the questions.
    """
    if PLACE_OF_QUESTIONS not in template:
        raise ValueError(f"the wording of a request has no place for its questions, {PLACE_OF_QUESTIONS}")
    tasks = [(length, item) for length in LENGTHS for item in items]
    paths = [images[length, item.dimension, item.index] for length, item in tasks]
    answers: list[Sequence[bool | None] | None] = [None] * len(tasks)
    unclear = Unclear(judge.model, max_unclear_share)
    if judge.follows_instructions:

        def together() -> Iterator[Asked]:
            for (_, item), path in zip(tasks, paths, strict=True):
                yield read_rgb(path), template.replace(PLACE_OF_QUESTIONS, "\n".join(item.questions))

        for place, text in judge.stream(together()):
            answers[place] = answer_lines(text, len(tasks[place][1].questions))
            if answers[place] is not None:
                unclear.asked += len(tasks[place][1].questions)
    singly = [place for place, found in enumerate(answers) if found is None]

    def one_by_one() -> Iterator[Asked]:
        for place in singly:
            image = read_rgb(paths[place])
            for question in tasks[place][1].questions:
                yield image, question

    said = iter(ask_yes_no(judge, one_by_one(), unclear))
    for place in singly:
        answers[place] = [next(said) for _ in tasks[place][1].questions]
    unclear.check()
    by_image = {
        (length, item.dimension, item.index): found or () for (length, item), found in zip(tasks, answers, strict=True)
    }
    scores = {
        length: scores_of(items, {key[1:]: by_image[key] for key in by_image if key[0] == length}) for length in LENGTHS
    }
    return TiifReport(scores, unclear, len(singly) if judge.follows_instructions else 0, by_image)


def scores_of(items: Sequence[TiifItem], answers: Mapping[tuple[str, int], Sequence[bool | None]]) -> TiifScores:
    """Scores of answers, given by dimension and index."""
    is_right: dict[str, list[float]] = {}
    for item in items:
        said = answers[item.dimension, item.index]
        is_right.setdefault(item.dimension, []).extend(
            float(answer is wanted) for answer, wanted in zip(said, item.expected, strict=True)
        )
    dimensions = {name: 100 * fmean(is_right[name]) for name in DIMENSIONS if name in is_right}

    def mean_of(names: Sequence[str]) -> float | None:
        found = [dimensions[name] for name in names if name in dimensions]
        return fmean(found) if found else None

    groups = {group: mean_of(names) for group, names in GROUPS.items()}
    present = {group: score for group, score in groups.items() if score is not None}
    return TiifScores(
        dimensions,
        present,
        mean_of([name for names in BASIC_GROUPS.values() for name in names]),
        mean_of([name for names in ADVANCED_GROUPS.values() for name in names]),
        fmean(present.values()) if len(present) == len(GROUPS) else None,
    )
