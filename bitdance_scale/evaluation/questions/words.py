"""How much of a text an image shows, given the lines that were read in it.

Word accuracy is the share of the expected words that were read, each read word counting for one expected word, in any
order. Words are compared after Unicode's compatibility normalisation (NFKC), without case and without the punctuation
around them. Scripts without blanks between words, such as Chinese, count a character as a word.

What a prompt asks for is what it puts in quotes: straight and curly double quotes, low ones of German, guillemets, and
the single and double corner brackets of Chinese and Japanese; also straight and curly single quotes where they stand
around words, so that an apostrophe is none. What is in quotes within quotes is part of the outer text. Double angle
brackets, which mark titles in Chinese, are no quotes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Blocks of Han, kana, Thai, Lao, Khmer and Burmese, by the first word of their characters' names.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")

# Pairs that are what they look like, and pairs whose signs are apostrophes as well.
_PAIRS = ('""', "\u201c\u201d", "\u201e\u201c\u201d", "\u00ab\u00bb", "\u300c\u300d", "\u300e\u300f")
_APOSTROPHES = ("''", "\u2018\u2019")
_QUOTED = re.compile(
    "|".join(
        [f"{pair[0]}([^{pair[1:]}]*)[{pair[1:]}]" for pair in _PAIRS]
        + [rf"(?<!\w){pair[0]}(?=\S)([^\n]+?)(?<=\S){pair[1]}(?!\w)" for pair in _APOSTROPHES]
    )
)


@dataclass(frozen=True)
class TextAccuracy:
    """What was read of an expected text.

    Attributes:
        words: number of expected words.
        words_read: number of them that were read.
        is_exact: whether the lines read are the expected ones in their order, after normalisation.
        edit_distance: Levenshtein distance of the normalised texts over the length of the longer, 0 to 1.
    """

    words: int
    words_read: int
    is_exact: bool
    edit_distance: float

    @property
    def word_accuracy(self) -> float:
        """Share of expected words that were read, 0 to 1."""
        return self.words_read / self.words


def compare(expected: Sequence[str], read: Sequence[str]) -> TextAccuracy:
    """Compares the lines that a prompt asks for with those that were read.

    Args:
        expected: lines, or words, in their order.
        read: lines that were read, in their order on the image.

    Raises:
        ValueError: no word is expected.
    """
    wanted, found = ([word for line in lines for word in words_of(line)] for lines in (expected, read))
    if not wanted:
        raise ValueError(f"the expected text {list(expected)!r} has no words")
    words_read = (Counter(wanted) & Counter(found)).total()
    wanted_lines, found_lines = ([" ".join(words_of(line)) for line in lines] for lines in (expected, read))
    is_exact = [line for line in wanted_lines if line] == [line for line in found_lines if line]
    return TextAccuracy(len(wanted), words_read, is_exact, edit_distance(" ".join(wanted), " ".join(found)))


def quoted_texts(prompt: str) -> list[str]:
    """The texts that a prompt puts in quotes, in their order; empty ones are left out."""
    texts = ("".join(filter(None, match.groups())).strip() for match in _QUOTED.finditer(prompt))
    return [text for text in texts if text]


def words_of(text: str) -> list[str]:
    """The words of a text, normalised: NFKC, no case, no punctuation at their ends."""
    spaced = "".join(f" {sign} " if _is_unspaced(sign) else sign for sign in unicodedata.normalize("NFKC", text))
    words = (_without_ends(word) for word in spaced.casefold().split())
    return [word for word in words if word]


def edit_distance(first: str, second: str) -> float:
    """Levenshtein distance over the length of the longer text: 0 for equal texts, 1 for nothing in common."""
    longest = max(len(first), len(second))
    if not longest:
        return 0.0
    above = list(range(len(second) + 1))
    for row, sign in enumerate(first, 1):
        left = [row]
        for column, other in enumerate(second, 1):
            left.append(min(above[column] + 1, left[-1] + 1, above[column - 1] + (sign != other)))
        above = left
    return above[-1] / longest


def _is_unspaced(sign: str) -> bool:
    return unicodedata.category(sign) == "Lo" and unicodedata.name(sign, "").startswith(_UNSPACED)


def _without_ends(word: str) -> str:
    """A word without the punctuation around it; signs such as $ and + stay."""
    is_kept = [not unicodedata.category(sign).startswith("P") or sign in "%&#@" for sign in word]
    if not any(is_kept):
        return ""
    return word[is_kept.index(True) : len(word) - is_kept[::-1].index(True)]
