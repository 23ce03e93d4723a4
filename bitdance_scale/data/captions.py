"""Which texts of a sample are captions, and what is wrong with it when there is none.

A caption has a source: `caption`, the `.txt` member or without one `caption` of the `.json`, as img2dataset writes them;
or a member by its extension (`txt`, `alt.txt`); or a field of a JSON member (`json:re_caption`, `syn.json:syn_text`). A
field may be a list: alternatives, of which one is drawn each time.

A sample whose caption is empty, missing or not UTF-8 is still an image worth learning: it is trained unconditionally, as
if its caption had been dropped, and the ledger counts it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitdance_scale.data.data_errors import ErrorCause

DEFAULT_SOURCE = "caption"
MAX_TEXT_BYTES = 1 << 20
"""A text or record above this is no caption and no record; it counts as invalid."""
SEPARATOR = "\0"
"""Between the alternatives of one caption in the index."""


class CaptionStatus(enum.IntEnum):
    """How the caption of an indexed sample was found; stored in the index as uint8."""

    USABLE = 0
    EMPTY = 1
    MISSING = 2
    INVALID = 3

    @property
    def fault(self) -> ErrorCause | None:
        """What the ledger counts a sample of this status under."""
        return _FAULTS[self]


_FAULTS = {
    CaptionStatus.USABLE: None,
    CaptionStatus.EMPTY: ErrorCause.EMPTY_CAPTION,
    CaptionStatus.MISSING: ErrorCause.MISSING_CAPTION,
    CaptionStatus.INVALID: ErrorCause.INVALID_CAPTION,
}
Found = tuple[bytes, CaptionStatus]
"""A caption in UTF-8, its alternatives divided by `SEPARATOR`, and its status; empty unless USABLE."""


@dataclass(frozen=True)
class CaptionSource:
    """Where a caption lies.

    Attributes:
        name: as in the configuration.
        extension: of the member.
        field: of the JSON that it holds; None: the member is the text.
    """

    name: str
    extension: str
    field: str | None

    @staticmethod
    def parse(name: str) -> CaptionSource:
        """Reads `txt`, `json:re_caption` and the like; `DEFAULT_SOURCE` is that of the `.txt` member."""
        if name == DEFAULT_SOURCE:
            return CaptionSource(name, "txt", None)
        extension, separator, field = name.partition(":")
        return CaptionSource(name, extension.lower(), field if separator else None)

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of all members that are looked at."""
        return ("txt", "json") if self.name == DEFAULT_SOURCE else (self.extension,)

    def find(self, texts: Mapping[str, bytes], records: Mapping[str, dict[str, Any]]) -> Found:
        """The caption of a sample.

        Args:
            texts: members of `extensions` that it has, by extension.
            records: those that hold a JSON object, read; others are left out.
        """
        if self.field is not None:
            return _of_values(records.get(self.extension, {}).get(self.field))
        text = texts.get(self.extension)
        if text is not None:
            return _of_text(text)
        if self.name == DEFAULT_SOURCE:
            return _of_values(records.get("json", {}).get("caption"))
        return b"", CaptionStatus.MISSING


def _of_text(text: bytes) -> Found:
    try:
        caption = text.decode("utf-8")
    except UnicodeDecodeError:
        return b"", CaptionStatus.INVALID
    return _cleaned([caption])


def _of_values(value: object) -> Found:
    if value is None:
        return b"", CaptionStatus.MISSING
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        return b"", CaptionStatus.INVALID
    return _cleaned(values)


def _cleaned(captions: Iterable[str]) -> Found:
    stripped = [caption.replace(SEPARATOR, " ").strip() for caption in captions]
    try:
        joined = SEPARATOR.join(caption for caption in stripped if caption).encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell lone surrogates, which no UTF-8 text holds.
        return b"", CaptionStatus.INVALID
    return joined, CaptionStatus.USABLE if joined else CaptionStatus.EMPTY
