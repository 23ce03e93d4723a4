"""DPG-Bench (Hu et al., arXiv 2403.05135): yes/no questions about an image that depend on each other.

The rules were checked against `dpg_bench/compute_dpg_bench.py` of github.com/TencentQQGYLab/ELLA. That script

- skips the first row of the csv, so that a question on the proposition there is asked without it: the script then fails
  on this prompt and leaves it out, unless an earlier parent of each such question was answered "no";
- keeps of an item whose rows are in several places only the last of them;
- zeroes in the order of the rows, so that a parent that is itself zeroed later has counted as answered "yes";
- takes the scores of categories from the last image of a prompt, and before zeroing.

`published` scores repeat this, for comparison with figures of others, on one process: with several, the script mixes
its categories. `corrected` scores do none of it. An answer that is neither yes nor no counts as no in both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.questions.image_folder import grid_tiles, read_rgb
from bitdance_scale.evaluation.questions.judge import MAX_UNCLEAR_SHARE, Asked, Judge, Unclear, ask_yes_no
from bitdance_scale.text_files import decode_utf8

NUM_IMAGES = 4
"""Images of a prompt, in a grid of 2 x 2."""
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_NO_PARENT = 0
Answers = Mapping[int, bool]
"""Whether a proposition's question was answered "yes", by its number."""


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
        corrected: propositions by item id, as the file has them, parents before what depends on them.
        published: the same as the published script sees them, in its order.
    """

    source: Path
    prompts: Mapping[str, str]
    corrected: Mapping[str, tuple[Proposition, ...]]
    published: Mapping[str, tuple[Proposition, ...]]


@dataclass(frozen=True)
class DpgScores:
    """Scores of all prompts, 0 to 100.

    Attributes:
        score: mean over prompts; NaN where all were left out.
        level_1, level_2: mean over the answers of a category.
        prompts: mean over a prompt's images, by item id.
        left_out: ids that have no score.
    """

    score: float
    level_1: Mapping[str, float]
    level_2: Mapping[str, float]
    prompts: Mapping[str, float]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class DpgReport:
    """Both scores of the same answers.

    Attributes:
        published: as the published script computes them.
        corrected: without its quirks.
        unclear: how many answers were neither yes nor no, with examples.
        answers: what the judge said by item id, image and proposition; None for neither.
    """

    published: DpgScores
    corrected: DpgScores
    unclear: Unclear
    answers: Mapping[str, Sequence[Mapping[int, bool | None]]]


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
    corrected = {item: _parents_first(item, found, path) for item, found in items.items()}
    return DpgQuestions(path, prompts, corrected, _as_the_script_reads(rows))


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


def measure_dpg(
    questions: DpgQuestions,
    images: Mapping[str, Path],
    judge: Judge,
    max_unclear_share: float = MAX_UNCLEAR_SHARE,
) -> DpgReport:
    """Asks a judge about the images of all items, and scores what it says.

    Args:
        questions: the benchmark.
        images: grids of 2 x 2 images by item id, for all items or some of them; `image_folder.match_images` finds them.
        judge: who is asked.
        max_unclear_share: share of answers that may be neither yes nor no.

    Raises:
        DataError: an image cannot be read or is no grid; an id is unknown.
        JudgeError: the judge cannot be asked, or too many of its answers are unclear.
    """
    unknown = [item for item in images if item not in questions.corrected]
    if unknown:
        raise DataError(f"{images[unknown[0]]}: {questions.source} has no questions about item {unknown[0]}")
    unclear = Unclear(judge.model, max_unclear_share)

    def asked() -> Iterator[Asked]:
        for item, path in images.items():
            for tile in grid_tiles(read_rgb(path), path):
                for proposition in questions.corrected[item]:
                    yield tile, proposition.question

    said = iter(ask_yes_no(judge, asked(), unclear))
    unclear.check()
    answers = {
        item: [{proposition.number: next(said) for proposition in questions.corrected[item]} for _ in range(NUM_IMAGES)]
        for item in images
    }
    is_yes = {
        item: [{n: bool(value) for n, value in image.items()} for image in found] for item, found in answers.items()
    }
    return DpgReport(published_scores(questions, is_yes), corrected_scores(questions, is_yes), unclear, answers)


def corrected_scores(questions: DpgQuestions, answers: Mapping[str, Sequence[Answers]]) -> DpgScores:
    """Scores of answers, given by item id and image; categories over all images and after zeroing."""
    prompts: dict[str, float] = {}
    categories: dict[str, list[float]] = {}
    for item, images in answers.items():
        propositions = questions.corrected[item]
        zeroed = [_zeroed(propositions, found) for found in images]
        prompts[item] = fmean(fmean(found.values()) for found in zeroed)
        for found in zeroed:
            for proposition in propositions:
                categories.setdefault(proposition.category, []).append(found[proposition.number])
    return _summary(prompts, categories, ())


def published_scores(questions: DpgQuestions, answers: Mapping[str, Sequence[Answers]]) -> DpgScores:
    """Scores of answers as the published script computes them; the head of this file says what is odd about them."""
    prompts: dict[str, float] = {}
    categories: dict[str, list[float]] = {}
    left_out: list[str] = []
    for item, images in answers.items():
        propositions = questions.published.get(item, ())
        try:
            prompts[item] = fmean(fmean(_zeroed(propositions, found).values()) for found in images)
        except (KeyError, ValueError):
            # A parent in the row that is skipped, or no row at all.
            left_out.append(item)
            continue
        for proposition in propositions:
            categories.setdefault(proposition.category, []).append(float(images[-1][proposition.number]))
    return _summary(prompts, categories, tuple(left_out))


def _zeroed(propositions: Sequence[Proposition], answers: Answers) -> dict[int, float]:
    """1 or 0 of each proposition, where one with a parent of 0 gets 0; in the order given.

    Raises:
        KeyError: a parent is not among the propositions.
    """
    scores = {proposition.number: float(answers[proposition.number]) for proposition in propositions}
    for proposition in propositions:
        if any(scores[parent] == 0 for parent in proposition.parents):
            scores[proposition.number] = 0.0
    return scores


def _summary(
    prompts: Mapping[str, float], categories: Mapping[str, list[float]], left_out: tuple[str, ...]
) -> DpgScores:
    level_1: dict[str, list[float]] = {}
    for category, scores in categories.items():
        level_1.setdefault(category.split("-")[0].strip(), []).extend(scores)
    return DpgScores(
        100 * fmean(prompts.values()) if prompts else float("nan"),
        {name: 100 * fmean(scores) for name, scores in sorted(level_1.items())},
        {name: 100 * fmean(scores) for name, scores in sorted(categories.items())},
        {item: 100 * score for item, score in prompts.items()},
        left_out,
    )
