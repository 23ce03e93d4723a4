"""Judges: models that are shown an image and asked a question, and what of their answers counts as yes or no.

An answer that is neither is never taken for one of the two: it is counted, and too many of them are an error.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import xxhash

from bitdance_scale.errors import BitDanceError
from bitdance_scale.wording import first_few

Asked = tuple[np.ndarray, str]
"""An image, uint8 [H, W, 3], and a question about it."""

MAX_UNCLEAR_SHARE = 0.05
"""Share of answers that may be neither yes nor no before a score means little."""
_MIN_ANSWERS = 100
_MAX_EXAMPLES = 20
_SHOWN_CHARACTERS = 80
_ONE_WORD = "Answer with one word, yes or no."
# The word alone, or with a sentence or a reason after it. "no idea", "yes and no" and "yes/no" are neither.
_YES_OR_NO = re.compile(
    r"[\W_]*(yes|no)(?=[ \t*_\"'\u201d\u2019)\]]*(?:$|[.,:;!\n(]|[-\u2013\u2014][\s\d]))", re.IGNORECASE
)
_FIELDS = ("image", "question", "model", "protocol", "answer")

Result = TypeVar("Result")


class JudgeError(BitDanceError):
    """A judge that cannot be asked, or whose answers cannot be used."""


class Judge(ABC):
    """Who answers questions about images.

    Attributes:
        model: name or path of the model.
        protocol: how it is asked, with a version; answers to another protocol are other answers.
        follows_instructions: whether it does what a question tells it, such as to answer in lines. A classifier of
            answers or a network for one question does not.
    """

    model: str
    protocol: str
    follows_instructions: bool

    @abstractmethod
    def stream(self, asked: Iterable[Asked]) -> Iterator[tuple[int, str]]:
        """(place in `asked`, the model's text), in the order in which answers arrive.

        `asked` is read as it is needed and in the caller's thread, so that not all images are in memory.

        Raises:
            JudgeError: the model cannot be asked; the answers that had arrived come first.
        """

    def answer(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        """The texts that answer one question about each image, in their order.

        Args:
            images: uint8 [H, W, 3] each.
            questions: as many.

        Raises:
            JudgeError: as `stream`.
            ValueError: there are more or fewer questions than images.
        """
        texts = dict(self.stream(zip(images, questions, strict=True)))
        return [texts[place] for place in range(len(texts))]


def yes_or_no(text: str) -> bool | None:
    """Whether a text says yes, or no, as its first word; None if neither."""
    found = _YES_OR_NO.match(text.strip())
    return None if found is None else found[1].lower() == "yes"


def as_yes_no_question(judge: Judge, question: str) -> str:
    """The question as it is put to a judge: one that follows instructions is told to answer with one word."""
    return f"{question.strip()} {_ONE_WORD}" if judge.follows_instructions else question.strip()


@dataclass
class Unclear:
    """Counts answers, and those that are neither yes nor no.

    Args:
        model: the judge's name, for messages.
        max_share: share of unclear answers that is let pass.

    Attributes:
        asked: number of answers so far.
        number: number of those that were neither.
        examples: the first of them, as "question -> answer".
    """

    model: str
    max_share: float = MAX_UNCLEAR_SHARE
    asked: int = 0
    number: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of unclear answers, 0 to 1."""
        return self.number / self.asked if self.asked else 0.0

    def count(self, question: str, text: str, said: bool | None) -> None:
        """Counts an answer.

        Raises:
            JudgeError: of a hundred answers or more, most were unclear; this judge is the wrong one.
        """
        self.asked += 1
        if said is None:
            self.number += 1
            if len(self.examples) < _MAX_EXAMPLES:
                self.examples.append(f"{_shortened(question)!r} -> {_shortened(text)!r}")
        if self.asked >= _MIN_ANSWERS and self.share > max(0.5, self.max_share):
            self._refuse()

    def check(self) -> None:
        """Checks the share of all answers.

        Raises:
            JudgeError: too many were unclear; names their share and examples.
        """
        if self.share > self.max_share:
            self._refuse()

    def _refuse(self) -> None:
        raise JudgeError(
            f"{self.model}: answered {self.number} of {self.asked} questions ({self.share:.1%}) with neither yes nor "
            f"no, at most {self.max_share:.1%} may be unclear: {first_few(self.examples)}. Use another judge, or allow "
            "a larger share"
        )


def ask_yes_no(judge: Judge, asked: Iterable[Asked], unclear: Unclear) -> list[bool | None]:
    """What a judge says to questions, each asked on its own: True for yes, False for no, None for neither.

    Args:
        judge: who is asked.
        asked: images and questions, read as they are needed.
        unclear: counts the answers; its limit is left to the caller to check at the end.

    Raises:
        JudgeError: the judge cannot be asked, or most of its first answers are unclear.
    """
    questions: list[str] = []

    def worded() -> Iterator[Asked]:
        for image, question in asked:
            questions.append(question)
            yield image, as_yes_no_question(judge, question)

    said: dict[int, bool | None] = {}
    for place, text in judge.stream(worded()):
        said[place] = yes_or_no(text)
        unclear.count(questions[place], text, said[place])
    return [said[place] for place in range(len(questions))]


class Remembered(Generic[Result]):
    """A function of an image whose last result is kept, as many questions in a row are about the same array.

    Args:
        function: what is computed of an image.
    """

    def __init__(self, function: Callable[[np.ndarray], Result]) -> None:
        self._function = function
        self._last: tuple[np.ndarray, Result] | None = None

    def __call__(self, image: np.ndarray) -> Result:
        """The function's result."""
        if self._last is None or self._last[0] is not image:
            self._last = (image, self._function(image))
        return self._last[1]


class KeptAnswers(Judge):
    """A judge whose answers are kept in a file, so that no question is asked twice.

    Each line is a JSON object of an answer: 128-bit xxh3 of the image's shape and pixels, question as it was put,
    model, protocol and text. It is written when the answer arrives. A line that a killed run left unfinished is asked
    again. To be used as a context, by one process per file.

    Args:
        judge: who is asked what is not in the file yet.
        path: the file; made where absent.

    Raises:
        JudgeError: the file is no file of answers.
        OSError: of the file system.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.model, self.protocol = judge.model, judge.protocol
        self.follows_instructions = judge.follows_instructions
        self.num_asked = 0
        self._judge = judge
        self._hash = Remembered(_image_hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known, ends_amid_line = _read_answers(path)
        self._file = path.open("ab")
        if ends_amid_line:
            self._file.write(b"\n")

    def __enter__(self) -> KeptAnswers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def stream(self, asked: Iterable[Asked]) -> Iterator[tuple[int, str]]:
        """As `Judge.stream`; answers of the file come without the judge."""
        known: deque[tuple[int, str]] = deque()
        missing: list[tuple[int, tuple[str, ...]]] = []

        def unknown() -> Iterator[Asked]:
            for place, (image, question) in enumerate(asked):
                key = (self._hash(image), question, self.model, self.protocol)
                if key in self._known:
                    known.append((place, self._known[key]))
                else:
                    missing.append((place, key))
                    yield image, question

        for number, text in self._judge.stream(unknown()):
            place, key = missing[number]
            self._keep(key, text)
            yield place, text
            while known:
                yield known.popleft()
        yield from known

    def _keep(self, key: tuple[str, ...], text: str) -> None:
        self.num_asked += 1
        self._known[key] = text
        line = json.dumps(dict(zip(_FIELDS, (*key, text), strict=True)), ensure_ascii=False)
        self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()


def check_answers(path: Path) -> None:
    """Checks a file of answers, which need not be there yet.

    Raises:
        JudgeError: it is no file of answers.
        OSError: of the file system.
    """
    _read_answers(path)


def _image_hash(image: np.ndarray) -> str:
    digest = xxhash.xxh3_128(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _read_answers(path: Path) -> tuple[dict[tuple[str, ...], str], bool]:
    """The answers of a file by their keys, and whether its last line is unfinished."""
    answers: dict[tuple[str, ...], str] = {}
    if not path.exists():
        return answers, False
    try:
        text = path.read_bytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        # A line may end within a character.
        text = path.read_bytes().decode("utf-8", "replace")
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        values = [record.get(name) for name in _FIELDS] if isinstance(record, dict) else []
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(_FIELDS):
            raise JudgeError(
                f"{path}: line {number} is no answer of a judge, whose fields are {', '.join(_FIELDS)}; name another "
                "file, or one that does not exist yet"
            )
        answers[tuple(texts[:-1])] = texts[-1]
    if not answers and len(lines) > 2:
        raise JudgeError(f"{path}: holds no answers of a judge; name another file, or one that does not exist yet")
    return answers, bool(lines[-1])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
