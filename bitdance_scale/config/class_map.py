"""Which number a class has: by its name in a class map, or by the number itself.

A class map is a text file with the name of a class per line, in the order of their numbers, or a JSON object of names
and numbers. `bitdance pack` writes one as `classes.txt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitdance_scale.config.schema import ClassesSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.text_files import is_utf8, read_utf8, split_lines

CLASSES_FILE = "classes.txt"
"""The class map that `bitdance pack` writes beside the shards, and that a run keeps in its folder."""
_LONGEST_SHOWN = 40


class ClassMap:
    """The names of n classes, whose numbers are 0 .. n - 1.

    Args:
        names: in order of their numbers.

    Raises:
        ValueError: there is none; one is empty, comes twice, is no line of text, or is the number of another class.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.numbers: Mapping[str, int] = {name: number for number, name in enumerate(self.names)}
        if not self.names:
            raise ValueError("names no class; write the name of a class per line, in order of their numbers")
        for number, name in enumerate(self.names):
            if not _is_line(name):
                raise ValueError(
                    f"class {number} has the name {name!r}: must be a line of UTF-8 text without white space around "
                    "it; correct the name"
                )
            if self.numbers[name] != number:
                raise ValueError(
                    f"classes {number} and {self.numbers[name]} have the same name {name!r}; give every class a name "
                    "of its own"
                )
            other = class_number(name, len(self.names))
            if other is not None and other != number:
                raise ValueError(
                    f"class {number} has the name {name!r}, which is the number of class {other}: a label {name!r} "
                    "could mean both; number the classes by such names, or rename them"
                )

    def text(self) -> str:
        """The map as a text file."""
        return "".join(f"{name}\n" for name in self.names)


class ClassLabels:
    """From the labels of data and prompts to the numbers of classes.

    Args:
        section: number of classes, and the class map if there is one.

    Raises:
        ConfigError: the map cannot be read or used, or has another number of classes.
    """

    def __init__(self, section: ClassesSection) -> None:
        self._num_classes, self._map = section.num_classes, section.map
        self.names: tuple[str, ...] = ()
        self._numbers: Mapping[str, int] = {}
        if not section.map:
            return
        found = read_class_map(section.map_path, f"classes.map = {section.map!r}")
        if len(found.names) != section.num_classes:
            raise ConfigError(
                f"classes.map = {section.map!r}: names {len(found.names)} classes, classes.num_classes = "
                f"{section.num_classes}; name every class once, or set classes.num_classes={len(found.names)}"
            )
        self.names, self._numbers = found.names, found.numbers

    def number(self, label: str) -> int | None:
        """The class of a label: by its name in the map, or by its number; None if it is neither."""
        found = self._numbers.get(label)
        return class_number(label, self._num_classes) if found is None else found

    @property
    def rule(self) -> str:
        """What a label must be, for messages."""
        numbers = f"the number of a class, 0 to {self._num_classes - 1} (classes.num_classes = {self._num_classes})"
        if not self.names:
            return numbers
        return f"a name in classes.map = {self._map!r} (such as {self.names[0][:_LONGEST_SHOWN]!r}), or {numbers}"


def class_number(text: str, num_classes: int) -> int | None:
    """The number that a text writes in decimal digits, without zeros in front; None if it is no number of a class."""
    # The length first: a text may be of any length, and Python refuses to read a very long number.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(num_classes))):
        return None
    return int(text) if str(int(text)) == text and int(text) < num_classes else None


def read_class_map(path: Path, named: str = "") -> ClassMap:
    """Reads a class map: a JSON object of names and numbers if it begins with a brace, lines of names otherwise.

    Args:
        path: the file.
        named: how messages call it, such as setting and value; empty: its path.

    Raises:
        ConfigError: it cannot be read, is no UTF-8 or no such map; says what is wrong where.
    """
    named = named or str(path)
    try:
        text = read_utf8(path)
        names = _names_of_json(text) if text.lstrip().startswith("{") else _names_of_lines(text)
        return ClassMap(names)
    except OSError as error:
        raise ConfigError(
            f"{named}: cannot be read ({error.strerror or error}); name a file with the name of a class per line, or a "
            "JSON object of names and numbers"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{named}: {error}") from error


def _is_line(name: str) -> bool:
    if not name or name.strip() != name or len(name.splitlines()) > 1 or "\0" in name:
        return False
    return is_utf8(name)


def _names_of_lines(text: str) -> list[str]:
    lines = split_lines(text) if text.strip() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"line {number} is empty; every line names a class, in order of their numbers")
    return [line.rstrip() for line in lines]


def _names_of_json(text: str) -> list[str]:
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise ValueError(f"is no valid JSON ({error}); write an object of names and numbers") from error
    names: dict[int, str] = {}
    seen: set[str] = set()
    for name, number in pairs:
        if type(number) is not int:
            raise ValueError(
                f"{name!r} has the value {_shown(number)}: must be the number of a class; write an object of names and "
                'numbers, such as {"n01440764": 0}'
            )
        if name in seen:
            raise ValueError(f"names {name!r} twice; give every class a name of its own")
        if not 0 <= number < len(pairs):
            raise ValueError(
                f"{name!r} has the number {number}: the numbers of {len(pairs)} classes must be 0 to {len(pairs) - 1}, "
                "each once; correct the numbers, or add the classes that are missing"
            )
        if number in names:
            raise ValueError(f"{names[number]!r} and {name!r} have the same number {number}; number every class once")
        names[number] = name
        seen.add(name)
    return [names[number] for number in range(len(names))]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with the names that come twice."""


def _shown(value: object) -> str:
    text = repr(dict(value) if isinstance(value, _Pairs) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
