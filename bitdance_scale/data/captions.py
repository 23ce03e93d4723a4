"""Which texts of a sample are captions, and what is wrong if it has none.

A caption has a source, which is one of four things:

- `caption`: the `.txt` member, or without one the field `caption` of the `.json`, as img2dataset writes them;
- a member by its extension (`txt`, `alt.txt`);
- a field of a JSON member (`json:re_caption`, `syn.json:syn_text`). The field may be a list of alternatives, of which
  one is drawn each time. A whole number counts as its digits;
- a part of the key: `key_prefix`, the file name up to its first underscore (`n01440764` of `n01440764_10026`), or
  `key_folder`, the folder (`n01440764` of `train/n01440764/xyz`).

A sample whose caption is empty, missing or not UTF-8 is still trained, because its image is worth learning. It is
trained without a caption, as if the caption had been dropped, and it is counted.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitdance_scale.data.data_errors import ErrorCause

DEFAULT_SOURCE = "caption"
KEY_PREFIX, KEY_FOLDER = "key_prefix", "key_folder"
KEY_SOURCES = (KEY_PREFIX, KEY_FOLDER)
"""Sources that are parts of the key."""
MAX_TEXT_BYTES = 1 << 20
"""A text or record that is longer counts as invalid."""
BYTE_ORDER_MARK = "\ufeff".encode()
"""Some editors begin a file with it; it is no part of the text."""
SEPARATOR = "\0"
"""Separates the alternatives of one caption in the index."""


class CaptionStatus(enum.IntEnum):
    """Whether a sample has a caption, and if not, why; stored in the index as uint8."""

    USABLE = 0
    EMPTY = 1
    MISSING = 2
    INVALID = 3

    @property
    def error(self) -> ErrorCause | None:
        """The cause under which a sample with this status is counted; None if it has a caption."""
        return _ERRORS[self]


_ERRORS = {
    CaptionStatus.USABLE: None,
    CaptionStatus.EMPTY: ErrorCause.EMPTY_CAPTION,
    CaptionStatus.MISSING: ErrorCause.MISSING_CAPTION,
    CaptionStatus.INVALID: ErrorCause.INVALID_CAPTION,
}
Found = tuple[bytes, CaptionStatus]
"""A caption in UTF-8, with its alternatives separated by `SEPARATOR`, and its status; empty unless USABLE."""


@dataclass(frozen=True)
class CaptionSource:
    """Where a caption lies.

    Attributes:
        name: the name in the configuration.
        extension: extension of the member.
        field: field of the JSON in the member; None: the member is the text.
    """

    name: str
    extension: str
    field: str | None

    @staticmethod
    def parse(name: str) -> CaptionSource:
        """The source of a name such as `txt` or `json:re_caption`; `DEFAULT_SOURCE` begins with the `.txt` member."""
        if name == DEFAULT_SOURCE:
            return CaptionSource(name, "txt", None)
        extension, separator, field = name.partition(":")
        return CaptionSource(name, extension.lower(), field if separator else None)

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of all members that may hold the caption."""
        if self.name in KEY_SOURCES:
            return ()
        return ("txt", "json") if self.name == DEFAULT_SOURCE else (self.extension,)

    def find(self, key: bytes, texts: Mapping[str, bytes], records: Mapping[str, dict[str, Any]]) -> Found:
        """The caption of a sample.

        Args:
            key: its key in the shard.
            texts: extension -> content of the members that the sample has.
            records: extension -> parsed content of those members that hold a JSON object.
        """
        if self.name in KEY_SOURCES:
            return found_in_key(self.name, key)
        if self.field is not None:
            return _of_values(records.get(self.extension, {}).get(self.field), takes_numbers=True)
        text = texts.get(self.extension)
        if text is not None:
            return _of_text(text)
        if self.name == DEFAULT_SOURCE:
            return _of_values(records.get("json", {}).get("caption"))
        return b"", CaptionStatus.MISSING


def part_of_key(source: str, key: bytes) -> bytes:
    """The part of a key that one of `KEY_SOURCES` names; empty if it has none."""
    folders, _, name = key.rpartition(b"/")
    if source == KEY_FOLDER:
        return folders.rpartition(b"/")[2]
    prefix, separator, _ = name.partition(b"_")
    return prefix if separator else b""


def found_in_key(source: str, key: bytes) -> Found:
    """The caption that one of `KEY_SOURCES` finds in a key."""
    part = part_of_key(source, key)
    return _of_text(part) if part else (b"", CaptionStatus.MISSING)


def _of_text(text: bytes) -> Found:
    try:
        caption = text.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError:
        return b"", CaptionStatus.INVALID
    return _cleaned([caption])


def _of_values(value: object, *, takes_numbers: bool = False) -> Found:
    if value is None:
        return b"", CaptionStatus.MISSING
    values = value if isinstance(value, list) else [value]
    # A truth value is an int to Python, and no number.
    texts = [str(text) for text in values if isinstance(text, str) or (takes_numbers and type(text) is int)]
    if len(texts) < len(values):
        return b"", CaptionStatus.INVALID
    return _cleaned(texts)


def _cleaned(captions: Iterable[str]) -> Found:
    stripped = [caption.replace(SEPARATOR, " ").strip().lstrip("\ufeff").strip() for caption in captions]
    try:
        joined = SEPARATOR.join(caption for caption in stripped if caption).encode("utf-8")
    except UnicodeEncodeError:
        # JSON can contain lone surrogates, which UTF-8 cannot encode.
        return b"", CaptionStatus.INVALID
    return joined, CaptionStatus.USABLE if joined else CaptionStatus.EMPTY
