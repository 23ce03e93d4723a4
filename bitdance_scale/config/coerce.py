"""From the plain values of a TOML document to a tree of typed, frozen dataclasses.

Strict: an integer may stand where a number is meant, nothing else is converted. Every mistake of a document is
collected, so that one run of the loader shows them all.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping

from bitdance_scale.renames import RENAMED_SETTINGS

Path = tuple[str, ...]

_SCALARS: Mapping[type, str] = {bool: "true or false", int: "integer", float: "number", str: "string"}
_INVALID = object()


def type_name(hint: object) -> str:
    """What messages and documentation call a type, such as `integer` or `list of (integer, integer)`."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    if dataclasses.is_dataclass(hint):
        return "table"
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(choice) for choice in typing.get_args(hint))
    assert typing.get_origin(hint) is tuple, f"a schema field of type {hint} cannot come from TOML"
    items = typing.get_args(hint)
    if len(items) == 2 and items[1] is Ellipsis:
        return f"list of {type_name(items[0])}"
    return f"({', '.join(type_name(item) for item in items)})"


def field_types(schema: type) -> dict[str, object]:
    """Resolved type of every field of a schema dataclass, in order of declaration."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


class Coercion:
    """Builds one configuration tree and collects what is wrong with the document.

    Attributes:
        problems: one line per unknown key, wrong type or missing setting.
    """

    def __init__(self, schema: type, source_of: Callable[[Path], str]) -> None:
        """`source_of` names the file or command line that set the value at a path."""
        self.problems: list[str] = []
        self._missing: list[str] = []
        self._schema = schema
        self._source_of = source_of

    def build(self, values: Mapping[str, object]) -> object:
        """An instance of the schema; meaningful only while `problems` is empty."""
        config = self._table(values, self._schema, ())
        if self._missing:
            self.problems.append(f"required settings are missing: {', '.join(self._missing)}; set them in the file")
        return config

    def _table(self, values: object, schema: type, path: Path) -> object:
        if not isinstance(values, Mapping):
            return self._wrong_type(values, schema, path)
        types = field_types(schema)
        for key in values:
            if key not in types:
                self._unknown(key, schema, path)
        arguments: dict[str, object] = {}
        for field in dataclasses.fields(schema):
            field_path, hint = (*path, field.name), types[field.name]
            if field.name in values:
                arguments[field.name] = self._value(values[field.name], hint, field_path)
            elif dataclasses.is_dataclass(hint):
                # An absent section stands for its defaults; what it requires is then reported by name.
                arguments[field.name] = self._table({}, hint, field_path)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self._missing.append(dotted(field_path))
                arguments[field.name] = _INVALID
        return schema(**arguments)

    def _value(self, value: object, hint: object, path: Path) -> object:
        if dataclasses.is_dataclass(hint):
            return self._table(value, hint, path)
        if hint is float and type(value) is int:
            value = float(value)
        if hint in _SCALARS:
            # `type`, not isinstance: true is no integer. Infinities and NaN are TOML, but no setting means them.
            is_right = type(value) is hint and (hint is not float or math.isfinite(value))
            return value if is_right else self._wrong_type(value, hint, path)
        if isinstance(hint, types.UnionType):
            # A word or a list: what the value looks like decides which of the two is meant.
            word, items = typing.get_args(hint)
            if type(value) is word:
                return value
            is_list = isinstance(value, list | tuple)
            return self._value(value, items, path) if is_list else self._wrong_type(value, hint, path)
        items = typing.get_args(hint)
        is_open = len(items) == 2 and items[1] is Ellipsis
        if not isinstance(value, list | tuple) or not (is_open or len(value) == len(items)):
            return self._wrong_type(value, hint, path)
        item_hints = [items[0]] * len(value) if is_open else items
        return tuple(
            self._value(item, item_hint, (*path, str(index)))
            for index, (item, item_hint) in enumerate(zip(value, item_hints, strict=True))
        )

    def _wrong_type(self, value: object, hint: object, path: Path) -> object:
        hint_text = type_name(hint)
        quote = "; put it in quotes" if hint is str and not isinstance(value, list | Mapping) else ""
        finite = " and finite" if isinstance(value, float) and not math.isfinite(value) else ""
        self.problems.append(
            f"{self._source_of(path)}: {dotted(path)} = {value!r}: expected {hint_text}{finite}, "
            f"found {_found(value)}{quote}"
        )
        return _INVALID

    def _unknown(self, key: str, schema: type, path: Path) -> None:
        what = "setting" if path else "section"
        self.problems.append(
            f"{self._source_of((*path, key))}: unknown {what} {dotted((*path, key))!r}"
            f"{_suggestion(key, path, schema, self._schema)}"
        )


def dotted(path: Path) -> str:
    """The path as users write it: `data.resolutions[0].side_px`."""
    text = ""
    for part in path:
        text += f"[{part}]" if part.isdigit() else f".{part}" if text else part
    return text


def _found(value: object) -> str:
    if isinstance(value, Mapping):
        return "table"
    if isinstance(value, list | tuple):
        return f"list of {len(value)}"
    return _SCALARS.get(type(value), type(value).__name__)


def _suggestion(key: str, path: Path, schema: type, root: type) -> str:
    """The legal name that the user most likely meant: nearest here, or the same key in another section."""
    legal = list(field_types(schema))
    renamed = RENAMED_SETTINGS.get(dotted((*path, key)))
    if renamed is not None:
        return f"; it is called {renamed} since version 0.2"
    nearest = difflib.get_close_matches(key, legal, n=1)
    if nearest:
        return f"; did you mean {dotted((*path, nearest[0]))!r}?"
    for section, hint in field_types(root).items():
        if dataclasses.is_dataclass(hint) and key in field_types(hint):
            return f"; did you mean {dotted((section, key))!r}?"
    return f"; legal names: {', '.join(legal)}"
