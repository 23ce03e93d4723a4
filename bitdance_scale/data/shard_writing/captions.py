"""From what stands beside a picture to its caption."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from bitdance_scale.data.captions import MAX_TEXT_BYTES
from bitdance_scale.data.data_errors import ErrorCause

# The mark of UTF-32 begins with that of UTF-16, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Caption:
    """A caption, or what is wrong with it.

    Attributes:
        text: the caption without white space around it; empty if there is a problem.
        problem: why there is no caption; None if there is one.
    """

    text: str
    problem: ErrorCause | None = None


NO_CAPTION = Caption("", ErrorCause.MISSING_CAPTION)


def caption_of_text(text: str) -> Caption:
    """The caption of a text from a table."""
    stripped = text.replace("\r\n", "\n").replace("\0", " ").strip().removeprefix("\ufeff").strip()
    try:
        num_bytes = len(stripped.encode("utf-8"))
    except UnicodeEncodeError:
        # JSON can contain lone surrogates, which UTF-8 cannot encode.
        return Caption("", ErrorCause.INVALID_CAPTION)
    if num_bytes > MAX_TEXT_BYTES:
        return Caption("", ErrorCause.INVALID_CAPTION)
    return Caption(stripped) if stripped else Caption("", ErrorCause.EMPTY_CAPTION)


def caption_of_bytes(content: bytes) -> Caption:
    """The caption in a file: UTF-8, or what its byte order mark says."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return caption_of_text(content.decode(encoding))
    except UnicodeDecodeError:
        return Caption("", ErrorCause.INVALID_CAPTION)


def caption_of_value(value: object) -> Caption:
    """The caption in a cell of a table: a text, or a list of texts of which the first is taken."""
    if value is None or (isinstance(value, float) and value != value):
        return NO_CAPTION
    if isinstance(value, list):
        found = [caption_of_value(item) for item in value]
        return next((caption for caption in found if caption.problem is None), found[0] if found else NO_CAPTION)
    return caption_of_text(value) if isinstance(value, str) else Caption("", ErrorCause.INVALID_CAPTION)
