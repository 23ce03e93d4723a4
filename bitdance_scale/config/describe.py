"""What a user can know about a setting: its type, default, meaning, legal values and the rules that read it."""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitdance_scale.config.coerce import example_override, field_types, is_schema, toml_value, type_name
from bitdance_scale.config.kinds import KINDS
from bitdance_scale.config.ranges import CONSTRAINTS, demand
from bitdance_scale.config.rules import RULES
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.renames import RENAMED_SETTINGS

_COLUMNS = 100


@dataclass(frozen=True)
class SettingDoc:
    """What a user can know about one setting.

    Attributes:
        path: such as `data.resolutions[].share`.
        type_name: such as `list of integers`.
        default: as TOML; None when the setting is required.
        doc: its meaning.
        example: an override as one types it in a shell; empty for what lies inside a list.
    """

    path: str
    type_name: str
    default: str | None
    doc: str
    example: str


def setting_docs(schema: type[Any], prefix: str = "") -> Iterator[SettingDoc]:
    """Every setting of a schema in order of declaration, those of nested tables included."""
    types = field_types(schema)
    for field in dataclasses.fields(schema):
        hint, path = types[field.name], f"{prefix}{field.name}"
        if is_schema(hint):
            yield from setting_docs(hint, f"{path}.")
            continue
        default = None if field.default is dataclasses.MISSING else toml_value(field.default)
        example = "" if "[]" in path else example_override(tuple(path.split(".")), field, hint)
        yield SettingDoc(path, type_name(hint), default, field.metadata["doc"], example)
        for item in typing.get_args(hint):
            if is_schema(item):
                yield from setting_docs(item, f"{path}[].")


def describe(schema: type[Any]) -> str:
    """All settings with type, default and meaning, as plain text."""
    return "".join(_entry(setting) for setting in setting_docs(schema))


def explain(name: str) -> str:
    """Everything about a setting, or about the settings of a section, for every kind of training that has it.

    Args:
        name: such as `data.resolutions`, `data.resolutions[0].share` or `data`.

    Raises:
        ConfigError: there is no such setting; names the nearest.
    """
    pattern = re.sub(r"\[\d*\]", "[]", name.strip().rstrip("."))
    parts = []
    for schema, kind in KINDS.items():
        inside = (f"{pattern}.", f"{pattern}[].")
        found = [doc for doc in setting_docs(schema) if doc.path == pattern or doc.path.startswith(inside)]
        if not found:
            continue
        rules = schema is RunConfig
        entries = [_entry(doc) + (_legal(doc.path) if rules else "") for doc in found]
        if len(found) == 1 and found[0].example:
            entries.append(f"      example: {found[0].example}\n")
        parts.append(f"{kind}:\n{''.join(entries)}{_rules(pattern) if rules else ''}")
    if not parts:
        raise ConfigError(f"{name}: there is no such setting{_nearest(pattern)}")
    return "\n".join(parts)


def _entry(setting: SettingDoc) -> str:
    default = "required" if setting.default is None else f"default {setting.default}"
    heading = f"  {setting.path}  ({setting.type_name}, {default})\n"
    return heading + textwrap.indent(textwrap.fill(setting.doc, _COLUMNS - 6), " " * 6) + "\n"


def _legal(path: str) -> str:
    lines = [
        f"      {'' if pattern == path else 'each item '}{demand(constraint)}"
        for pattern, constraint in CONSTRAINTS.items()
        if pattern in (path, f"{path}[]")
    ]
    return "".join(f"{line}\n" for line in lines)


def _rules(path: str) -> str:
    rules = [rule for rule in RULES if rule.reads(path.split("[]")[0])]
    if not rules:
        return ""
    lines = [
        textwrap.fill(f"{rule.claim} {rule.reason}", _COLUMNS, initial_indent="  - ", subsequent_indent="    ")
        for rule in rules
    ]
    return "\n".join(["  rules:", *lines]) + "\n"


def _nearest(path: str) -> str:
    renamed = RENAMED_SETTINGS.get(path)
    if renamed is not None:
        return f"; it is called {renamed} since version 0.2"
    paths = [doc.path for schema in KINDS for doc in setting_docs(schema)]
    last = path.split(".")[-1]
    same_key = [known for known in paths if known.split(".")[-1] == last]
    nearest = list(dict.fromkeys([*same_key, *difflib.get_close_matches(path, paths, n=3)]))
    if nearest:
        return f"; did you mean {' or '.join(nearest[:3])}?"
    sections = dict.fromkeys(known.split(".")[0] for known in paths)
    return f"; the sections are {', '.join(sections)}"
