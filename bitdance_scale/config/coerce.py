"""Builds a tree of typed, frozen dataclasses from the plain values of a TOML document, and writes values as TOML.

The build is strict: an integer is accepted for a number, and nothing else is converted. It collects every mistake of a
document, so that one run of the loader shows them all.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import reprlib
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

from bitdance_scale.renames import RENAMED_SETTINGS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Path = tuple[str, ...]
Schema = TypeVar("Schema")

# Type -> (one of it, several of it).
_SCALARS: Mapping[object, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("string", "strings"),
}
_INVALID = object()
# Those that every TOML reader has; nothing that a setting is read into holds more.
_INTEGERS = range(-(2**63), 2**63)
_WORD = re.compile(r"(?!(?:true|false|inf|nan)$)[A-Za-z_][\w./:-]*")


def is_schema(hint: object) -> TypeGuard[type[Any]]:
    """Whether a type is a dataclass, and so a table of a TOML document."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def field_types(schema: type[Any]) -> dict[str, object]:
    """Resolved type of every field of a schema dataclass, in order of declaration."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def type_name(hint: object, *, is_plural: bool = False) -> str:
    """What messages and documentation call a type, such as `integer` or `list of pairs of integers`."""
    if hint in _SCALARS:
        return _SCALARS[hint][is_plural]
    s = "s" if is_plural else ""
    if is_schema(hint):
        return f"table{s}"
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(choice, is_plural=is_plural) for choice in typing.get_args(hint))
    item, length = _list_items(hint)
    items = type_name(item, is_plural=True)
    return f"list{s} of {items}" if length is None else f"pair{s} of {items}"


def written_fields(table: DataclassInstance) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields of a table that are written as TOML: all but the open ends of a range.

    An open end is a default that is infinite: no file needs to say it.
    """
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if not _is_open_end(value, field):
            yield field.name, value


def toml_value(value: object) -> str:
    """A setting's value as TOML on one line.

    Args:
        value: a scalar, a dataclass, or a tuple of values.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    assert dataclasses.is_dataclass(value) and not isinstance(value, type), f"{value!r} has no TOML form"
    pairs = (f"{name} = {toml_value(item)}" for name, item in written_fields(value))
    return f"{{ {', '.join(pairs)} }}"


def example_override(path: Path, field: dataclasses.Field[Any], hint: object) -> str:
    """An override of a setting as one types it in a shell, such as `data.shards='["data/demo"]'`."""
    text = field.metadata.get("example")
    if text is None:
        has_default = field.default is not dataclasses.MISSING and field.default not in ("", ())
        text = toml_value(field.default) if has_default else _any_value(hint)
    # A string that is no other TOML value needs no quotes.
    is_word = hint is str and _WORD.fullmatch(text[1:-1]) is not None
    return f"{dotted(path)}={shlex.quote(text[1:-1] if is_word else text)}"


def _any_value(hint: object) -> str:
    """Some value of a type, as TOML."""
    if hint in _SCALARS:
        return {bool: "true", int: "1", float: "0.5", str: '"name"'}[hint]  # type: ignore[index] # it is one of them
    item, length = _list_items(hint)
    return f"[{', '.join([_any_value(item)] * (length or 1))}]"


class Coercion(Generic[Schema]):
    """Builds one configuration tree and collects what is wrong with the document.

    Attributes:
        problems: one line per unknown key, wrong type or missing setting.
    """

    def __init__(self, schema: type[Schema], source_of: Callable[[Path], str]) -> None:
        """`source_of` names the file or command line that set the value at a path."""
        self.problems: list[str] = []
        self._missing: list[str] = []
        self._schema = schema
        self._source_of = source_of

    def build(self, values: Mapping[str, object]) -> Schema:
        """An instance of the schema; meaningful only while `problems` is empty."""
        config: Schema = self._table(values, self._schema, ())
        if self._missing:
            self.problems.append(f"required settings are missing: {', '.join(self._missing)}; set them in the file")
        return config

    def _table(self, values: object, schema: type[Any], path: Path) -> Any:
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
                value = values[field.name]
                # Earlier versions wrote open ends into run folders and checkpoints.
                is_read = _is_open_end(value, field)
                arguments[field.name] = value if is_read else self._value(value, hint, field_path)
            elif is_schema(hint):
                # An absent section has its defaults; what it requires is then reported by name.
                arguments[field.name] = self._table({}, hint, field_path)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self._missing.append(dotted(field_path))
                arguments[field.name] = _INVALID
        return schema(**arguments)

    def _value(self, value: object, hint: object, path: Path) -> object:
        if is_schema(hint):
            return self._table(value, hint, path)
        if hint in _SCALARS:
            if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
                value = float(value)
            # `type`, not isinstance: true is no integer.
            is_right = type(value) is hint and not _is_beyond(value)
            return value if is_right else self._wrong_type(value, hint, path)
        if isinstance(hint, types.UnionType):
            # A word or a list: what the value looks like decides which of the two is meant.
            word, items = typing.get_args(hint)
            if type(value) is word:
                return value
            is_list = isinstance(value, list | tuple)
            return self._value(value, items, path) if is_list else self._wrong_type(value, hint, path)
        item_hint, length = _list_items(hint)
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return self._wrong_type(value, hint, path)
        return tuple(self._value(item, item_hint, (*path, str(index))) for index, item in enumerate(value))

    def _wrong_type(self, value: object, hint: object, path: Path) -> object:
        shown = reprlib.repr(value) if type(value) is int else repr(value)
        self.problems.append(
            f"{self._source_of(path)}: {dotted(path)} = {shown}: expected {_expected(value, hint)}"
            f"{self._example(value, hint, path)}; got {_found(value, hint)}"
        )
        return _INVALID

    def _example(self, value: object, hint: object, path: Path) -> str:
        """What to write instead, where the setting can be overridden by itself."""
        if any(part.isdigit() for part in path):
            # An item of a list has no override of its own.
            return ""
        if hint is str and not isinstance(value, list | Mapping):
            return f", which is written in quotes: {dotted(path)}={shlex.quote(toml_value(str(value)))}"
        if is_schema(hint):
            field, field_hint = dataclasses.fields(hint)[0], next(iter(field_types(hint).values()))
            return f" of settings, such as {example_override((*path, field.name), field, field_hint)}"
        section: type[Any] = self._schema
        for part in path[:-1]:
            inner = field_types(section)[part]
            assert is_schema(inner), f"{dotted(path)} is no setting of a table"
            section = inner
        field = {field.name: field for field in dataclasses.fields(section)}[path[-1]]
        return f", such as {example_override(path, field, hint)}"

    def _unknown(self, key: str, schema: type[Any], path: Path) -> None:
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


def _is_open_end(value: object, field: dataclasses.Field[Any]) -> bool:
    return isinstance(value, float) and math.isinf(value) and value == field.default


def _is_beyond(value: object) -> bool:
    """Whether it is infinite, not a number, or too large an integer: a file may hold it, and no setting means it."""
    return value not in _INTEGERS if type(value) is int else isinstance(value, float) and not math.isfinite(value)


def _list_items(hint: object) -> tuple[object, int | None]:
    """(type of the items, how many there must be, None for any number) of a tuple type."""
    assert typing.get_origin(hint) is tuple, f"a schema field of type {hint} cannot come from TOML"
    items = typing.get_args(hint)
    assert len(items) == 2 and items[1] in (items[0], Ellipsis), f"{hint}: neither a list nor a pair of one type"
    return items[0], None if items[1] is Ellipsis else 2


def _with_article(hint: object) -> str:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = [type_name(choice) for choice in choices]
    return " or ".join(
        name if choice is bool else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        for name, choice in zip(names, choices, strict=True)
    )


def _expected(value: object, hint: object) -> str:
    """What a value should have been, in words."""
    if _is_beyond(value) and hint is float:
        return "a finite number"
    if _is_beyond(value) and hint is type(value):
        return "an integer from -2^63 to 2^63 - 1"
    return _with_article(hint)


def _found(value: object, hint: object) -> str:
    """A value's kind in words."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str):
        return "a string" if hint in _SCALARS or is_schema(hint) else "one string"
    kind = _with_article(type(value)) if type(value) in _SCALARS else f"a {type(value).__name__}"
    return f"{kind} of {value.bit_length()} bits" if type(value) is int and _is_beyond(value) else kind


def _suggestion(key: str, path: Path, schema: type[Any], root: type[Any]) -> str:
    """The legal name that the user most likely meant: nearest here, or the same key in another section."""
    legal = list(field_types(schema))
    renamed = RENAMED_SETTINGS.get(dotted((*path, key)))
    if renamed is not None:
        return f"; it is called {renamed} since version 0.2"
    nearest = difflib.get_close_matches(key, legal, n=1)
    if nearest:
        return f"; did you mean {dotted((*path, nearest[0]))!r}?"
    for section, hint in field_types(root).items():
        if is_schema(hint) and key in field_types(hint):
            return f"; did you mean {dotted((section, key))!r}?"
    return f"; legal names: {', '.join(legal)}"
