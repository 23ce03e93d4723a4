"""Which columns of a table are captions, which name pictures, and what becomes of the others."""

from __future__ import annotations

import datetime
import decimal
import math
import re
from collections.abc import Sequence
from typing import Any

from bitdance_scale.errors import DataError

CAPTION_COLUMNS = ("text", "caption")
OWN_FIELDS = frozenset(
    {
        "key",
        "caption",
        "status",
        "error_message",
        "width",
        "height",
        "original_width",
        "original_height",
        "original_name",
        "converted_from",
        "sha256",
    }
)
"""Fields that the record has of its own; a column of the same name is left out."""
NOT_STORED = object()
"""The value of a cell that a record cannot hold."""
_MAX_DIGITS = 18
"""A whole number of more is an identifier."""
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.ASCII | re.IGNORECASE)


def caption_column(columns: Sequence[str], wanted: str, where: str) -> str:
    """The column that holds the captions.

    Args:
        columns: of the table.
        wanted: what the user named; empty: by `CAPTION_COLUMNS`.
        where: the table, for messages.

    Raises:
        DataError: there is no such column, or two that could be it.
    """
    if wanted:
        if wanted not in columns:
            raise DataError(f"{where}: there is no column {wanted!r}; the columns are {', '.join(columns)}")
        return wanted
    found = [name for name in columns if name.lower() in CAPTION_COLUMNS]
    if len(found) != 1:
        problem = f"the columns {' and '.join(found)} could all be captions" if found else "no column text or caption"
        raise DataError(f"{where}: {problem}; name it with --caption COLUMN. The columns are {', '.join(columns)}")
    return found[0]


def file_name_column(columns: Sequence[str], wanted: str, where: str) -> str:
    """The column that holds the names of pictures, as Hugging Face's imagefolder calls it.

    Raises:
        DataError: there is no such column, or two that could be it.
    """
    if wanted:
        if wanted not in columns:
            raise DataError(f"{where}: there is no column {wanted!r}; the columns are {', '.join(columns)}")
        return wanted
    found = [name for name in columns if name == "file_name"] or [n for n in columns if n.endswith("_file_name")]
    if len(found) != 1:
        problem = f"the columns {' and '.join(found)} all name files" if found else "no column file_name or *_file_name"
        raise DataError(f"{where}: {problem}; name it with --image COLUMN. The columns are {', '.join(columns)}")
    return found[0]


def record_value(value: object) -> object:
    """A cell as JSON holds it; `NOT_STORED` for bytes, structs and numbers that are not finite."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else NOT_STORED
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        values = [record_value(item) for item in value]
        return NOT_STORED if any(item is NOT_STORED for item in values) else values
    return NOT_STORED


def record_columns(row: dict[str, Any], image: str = "", caption: str = "") -> dict[str, Any]:
    """The fields that a row adds to a record.

    Args:
        row: column -> value.
        image: column of the picture or its name.
        caption: column of the caption; a list of captions stays in the record, because only its first is written.
    """
    left_out = {image, *OWN_FIELDS}
    if not isinstance(row.get(caption), list):
        left_out.add(caption)
    fields = {str(name): record_value(value) for name, value in row.items() if name not in left_out}
    return {name: value for name, value in fields.items() if value is not NOT_STORED}


def numbers_of_texts(cells: list[str]) -> list[Any]:
    """A column of a CSV: as numbers and None if it holds nothing but numbers and empty cells, or as it is.

    Numbers are those that programs write, `nan` and `inf` with them. Identifiers such as `2023_01` or of 20 digits, and
    the digits of other scripts, would be numbers to Python as well.
    """
    converted: list[Any] = []
    for cell in cells:
        text = cell.strip()
        is_whole = text.removeprefix("-").isdigit()
        if text and (not _NUMBER.fullmatch(text) or (is_whole and len(text) > _MAX_DIGITS)):
            return cells
        converted.append(None if not text else int(text) if is_whole else float(text))
    return converted if any(value is not None for value in converted) else cells
