"""The field of a configuration tree: a default and its documentation."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, overload

Value = TypeVar("Value")


@overload
def setting(*, doc: str, example: str | None = None) -> Any: ...
@overload
def setting(default: Value, *, doc: str, example: str | None = None) -> Value: ...
def setting(default: Any = dataclasses.MISSING, *, doc: str, example: str | None = None) -> Any:
    """A dataclass field with its documentation; without a default the setting is required.

    Args:
        default: its value where no file or override has one.
        doc: what it means.
        example: a value as TOML, shown where its default would not show how to write one.
    """
    metadata = {"doc": doc, "example": example}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
