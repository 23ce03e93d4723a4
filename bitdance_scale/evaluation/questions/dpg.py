"""DPG-Bench (Hu et al., arXiv 2403.05135): yes/no questions about an image that depend on each other.

The rules were checked against `dpg_bench/compute_dpg_bench.py` of github.com/TencentQQGYLab/ELLA. That script

- skips the first row of the csv, so that a question on the proposition there is asked without it: the script then fails
  on this prompt and leaves it out, unless an earlier parent of each such question was answered "no";
- keeps of an item whose rows are in several places only the last of them;
- zeroes in the order of the rows, so that a parent that is itself zeroed later has counted as answered "yes";
- takes the scores of categories from the last image of a prompt, and before zeroing.

`published_scores` repeat this, for comparison with figures of others, on one process: with several, the script mixes
its categories. `image_scores` do none of it. An answer that is neither yes nor no counts as no in both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.questions.judge import Asked, Judge, Unclear, ask_yes_no
from bitdance_scale.text_files import decode_utf8
from bitdance_scale.wording import first_few

_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_NO_PARENT = 0
Answers = Mapping[int, bool | None]
"""What was answered to the question of each proposition, by its number: True for "yes", None for neither yes nor no."""


@dataclass(frozen=True)
class Proposition:
    """One thing that a prompt says, and the question whether an image shows it.

    Attributes:
        number: its id within the item.
        parents: ids of those that must hold for it to hold.
        category: what it is about, such as "attribute - color"; before the dash is level 1, all of it level 2.
        question: the question.
        line: line of the file.
    """

    number: int
    parents: tuple[int, ...]
    category: str
    question: str
    line: int


@dataclass(frozen=True)
class DpgQuestions:
    """A file of questions.

    Attributes:
        source: the file.
        prompts: prompts by item id.
        propositions: by item id, as the file has them, parents before what depends on them.
        published: the same as the published script sees them, in its order.
    """

    source: Path
    prompts: Mapping[str, str]
    propositions: Mapping[str, tuple[Proposition, ...]]
    published: Mapping[str, tuple[Proposition, ...]]


@dataclass(frozen=True)
class PublishedScores:
    """Scores of all prompts as the published script computes them, 0 to 1.

    Attributes:
        score: mean over prompts; NaN where all were left out.
        level_1, level_2: mean over the answers of a category.
        left_out: ids that have no score.
    """

    score: float
    level_1: Mapping[str, float]
    level_2: Mapping[str, float]
    left_out: tuple[str, ...]


def read_questions(path: Path) -> DpgQuestions:
    """Reads `dpg_bench.csv`.

    Raises:
        DataError: it cannot be read, is another file, or has a row against the rules; names the line.
    """
    try:
        text = decode_utf8(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; name the benchmark's dpg_bench.csv") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or ()
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DataError(
            f"{path}: has no column {', '.join(missing)}, but {', '.join(columns) or 'nothing'}; name dpg_bench.csv "
            "of DPG-Bench"
        )
    rows: list[tuple[str, Proposition]] = []
    prompts: dict[str, str] = {}
    for row in reader:
        item, proposition = _read_row(row, path, reader.line_num)
        rows.append((item, proposition))
        prompts.setdefault(item, row["text"])
    if not rows:
        raise DataError(f"{path}: has no rows; download it again")
    items: dict[str, list[Proposition]] = {}
    for item, proposition in rows:
        items.setdefault(item, []).append(proposition)
    propositions = {item: _parents_first(item, found, path) for item, found in items.items()}
    return DpgQuestions(path, prompts, propositions, _as_the_script_reads(rows))


def _read_row(row: Mapping[str, str | None], path: Path, line: int) -> tuple[str, Proposition]:
    if any(row[name] is None for name in _COLUMNS):
        raise DataError(f"{path}: line {line} has too few columns; download it again")
    values = {name: str(row[name]).strip() for name in _COLUMNS}
    for name in ("item_id", "question_natural_language"):
        if not values[name]:
            raise DataError(f"{path}: line {line} has no {name}; download it again")
    try:
        number = int(values["proposition_id"])
        parents = tuple(int(part) for part in values["dependency"].split(","))
    except ValueError as error:
        raise DataError(
            f"{path}: line {line} has proposition_id {values['proposition_id']!r} and dependency "
            f"{values['dependency']!r}, expected a number, and numbers with commas between them; download it again"
        ) from error
    category = values["tuple"].split("(")[0].strip()
    parents = tuple(parent for parent in parents if parent != _NO_PARENT)
    return values["item_id"], Proposition(number, parents, category, values["question_natural_language"], line)


def _parents_first(item: str, propositions: Sequence[Proposition], path: Path) -> tuple[Proposition, ...]:
    """The propositions of an item, in the order of rows but with parents before what depends on them.

    Raises:
        DataError: ids come twice, parents are unknown, or propositions depend on themselves.
    """
    by_number: dict[int, Proposition] = {}
    for proposition in propositions:
        other = by_number.setdefault(proposition.number, proposition)
        if other is not proposition:
            raise DataError(
                f"{path}: lines {other.line} and {proposition.line} both are proposition {proposition.number} of item "
                f"{item}; ids must differ within an item"
            )
    for proposition in propositions:
        unknown = [parent for parent in proposition.parents if parent not in by_number]
        if unknown:
            raise DataError(
                f"{path}: line {proposition.line} depends on proposition {unknown[0]}, which item {item} does not "
                f"have; its propositions are {', '.join(map(str, sorted(by_number)))}"
            )
    ordered: dict[int, Proposition] = {}
    while len(ordered) < len(by_number):
        num_before = len(ordered)
        for proposition in propositions:
            if all(parent in ordered for parent in proposition.parents):
                ordered.setdefault(proposition.number, proposition)
        if len(ordered) == num_before:
            left = [p for p in propositions if p.number not in ordered]
            raise DataError(
                f"{path}: propositions {', '.join(str(p.number) for p in left)} of item {item} (from line "
                f"{left[0].line}) depend on themselves in a cycle; no dependency may lead back"
            )
    return tuple(ordered.values())


def _as_the_script_reads(rows: Sequence[tuple[str, Proposition]]) -> dict[str, tuple[Proposition, ...]]:
    items: dict[str, list[Proposition]] = {}
    previous = None
    for item, proposition in rows[1:]:
        if item != previous:
            items[item] = []
        items[item].append(proposition)
        previous = item
    return {item: tuple(found) for item, found in items.items()}


def ask_dpg(
    questions: DpgQuestions, images: Iterable[tuple[str, Sequence[np.ndarray]]], judge: Judge, unclear: Unclear
) -> dict[str, list[Answers]]:
    """Asks a judge about images, which are read as they are needed.

    Args:
        questions: the benchmark.
        images: item ids, each with the images uint8 [H, W, 3] of its prompt.
        judge: who is asked.
        unclear: counts the answers; its limit is checked here.

    Returns:
        The answers by item id and image.

    Raises:
        JudgeError: the judge cannot be asked, or too many of its answers are unclear.
    """
    asked_of: list[tuple[str, int]] = []

    def asked() -> Iterator[Asked]:
        for item, found in images:
            asked_of.append((item, len(found)))
            for image in found:
                for proposition in questions.propositions[item]:
                    yield image, proposition.question

    said = iter(ask_yes_no(judge, asked(), unclear))
    unclear.check()
    return {
        item: [{proposition.number: next(said) for proposition in questions.propositions[item]} for _ in range(number)]
        for item, number in asked_of
    }


def image_scores(
    questions: DpgQuestions, answers: Mapping[str, Sequence[Answers]], sources: Mapping[str, str]
) -> list[ImageScore]:
    """Scores of images after zeroing, with every category as a part.

    The value of an image is its share of yes, and the overall value the mean over images. A category of level 2, such
    as "attribute - color", is named as in the file, and one of level 1, such as "attribute", by what is before the
    dash; their parts are means over answers. Where both have one name they are one part.

    Args:
        questions: the benchmark.
        answers: by item id and image.
        sources: of each item, the category whose number of prompts is kept when intervals are computed.
    """
    scores = []
    for item, images in answers.items():
        propositions = questions.propositions[item]
        for k, found in enumerate(images):
            zeroed = _zeroed(propositions, found)
            value = fmean(zeroed.values())
            parts = {OVERALL: (value, 1.0)}
            for proposition in propositions:
                for name in dict.fromkeys((_level_1(proposition.category), proposition.category)):
                    yes, number = parts.get(name, (0.0, 0.0))
                    parts[name] = (yes + zeroed[proposition.number], number + 1)
            scores.append(ImageScore(item, k, sources[item], value, parts, _reason(propositions, found, zeroed)))
    return scores


def _reason(propositions: Sequence[Proposition], answers: Answers, zeroed: Mapping[int, float]) -> str:
    """The questions that count as no, and why."""
    words = {None: "unclear", False: "no", True: "no, as what it depends on is not there"}
    wrong = [f"{p.question} {words[answers[p.number]]}" for p in propositions if not zeroed[p.number]]
    return first_few(wrong)


def published_scores(questions: DpgQuestions, answers: Mapping[str, Sequence[Answers]]) -> PublishedScores:
    """Scores of answers as the published script computes them; the head of this file says what is odd about them."""
    prompts: list[float] = []
    level_1: dict[str, list[float]] = {}
    level_2: dict[str, list[float]] = {}
    left_out: list[str] = []
    for item, images in answers.items():
        propositions = questions.published.get(item, ())
        try:
            prompts.append(fmean(fmean(_zeroed(propositions, found).values()) for found in images))
        except (KeyError, ValueError):
            # A parent in the row that is skipped, or no row at all.
            left_out.append(item)
            continue
        for proposition in propositions:
            score = float(bool(images[-1][proposition.number]))
            level_1.setdefault(_level_1(proposition.category), []).append(score)
            level_2.setdefault(proposition.category, []).append(score)
    return PublishedScores(
        fmean(prompts) if prompts else float("nan"),
        {name: fmean(scores) for name, scores in sorted(level_1.items())},
        {name: fmean(scores) for name, scores in sorted(level_2.items())},
        tuple(left_out),
    )


def _zeroed(propositions: Sequence[Proposition], answers: Answers) -> dict[int, float]:
    """1 or 0 of each proposition, where one with a parent of 0 gets 0; in the order given.

    Raises:
        KeyError: a parent is not among the propositions.
    """
    scores = {proposition.number: float(bool(answers[proposition.number])) for proposition in propositions}
    for proposition in propositions:
        if any(scores[parent] == 0 for parent in proposition.parents):
            scores[proposition.number] = 0.0
    return scores


def _level_1(category: str) -> str:
    return category.split("-")[0].strip()
