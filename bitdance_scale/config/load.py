"""Reads configurations and writes them as TOML.

Layers, later ones win: the schema's defaults, the preset that `model.preset` names, the files that `extends` names,
the file itself, the overrides of the command line. The format is TOML because YAML reads `1e-5` as a string and accepts
a key that is written twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from bitdance_scale.config.coerce import Coercion, field_types, toml_value, written_fields
from bitdance_scale.config.lora_schema import LoraOnly, LoraSection
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.schema import ModelSection, NetworkConfig, RunConfig
from bitdance_scale.config.shipped import config_path, shipped_configs
from bitdance_scale.config.storage_rules import credential_faults
from bitdance_scale.errors import ConfigError
from bitdance_scale.text_files import read_utf8

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Schema = TypeVar("Schema")
_COMMAND_LINE = "command line"


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str] = (), *, schema: type[Schema]) -> Schema: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], schema: type[Schema]) -> Schema: ...
def load_config(path: str | Path, overrides: Sequence[str] = (), schema: type[Any] = RunConfig) -> Any:
    """Loads a TOML file into a configuration tree.

    Args:
        path: the file, or the name of a configuration that comes with the package. Its top-level key `extends` may name
            one other file, relative to it, or such a name, whose settings it changes, and so on. Tables merge key by
            key, lists are replaced.
        overrides: `section.key=value`, the value written as in TOML; a value that is no TOML is taken as a string.
        schema: dataclass of the tree.

    Returns:
        The schema's instance with every setting resolved. Rules that span settings are `rules.check`'s.

    Raises:
        ConfigError: the file cannot be read or is no TOML, or settings are unknown (naming the nearest legal name),
            missing or of the wrong type; one error lists them all.
    """
    return _load(path, overrides, schema, skips_other_sections=False)


def section_names(path: str | Path) -> set[str]:
    """The sections that a file, or one that it extends, has.

    Raises:
        ConfigError: a file cannot be read or is no TOML.
    """
    return {name for _, layer in _read_layers(config_path(path)) for name in layer}


def _load(path: str | Path, overrides: Sequence[str], schema: type[Schema], skips_other_sections: bool) -> Schema:
    layers = [*_read_layers(config_path(path)), (_COMMAND_LINE, _parse_overrides(overrides))]
    values: dict[str, object] = {}
    sources: dict[tuple[str, ...], str] = {}
    for source, layer in layers:
        _merge(values, layer, source, sources, ())
    _fill_in_preset(values, schema, sources)
    if skips_other_sections:
        values = {name: section for name, section in values.items() if name in field_types(schema)}
    # Before any message repeats a value.
    if faults := list(credential_faults(values)):
        raise ConfigError(_listed(f"{path}: the configuration cannot be used", faults))

    def source_of(setting_path: tuple[str, ...]) -> str:
        for length in range(len(setting_path), 0, -1):
            if setting_path[:length] in sources:
                return sources[setting_path[:length]]
        return str(path)

    coercion = Coercion(schema, source_of)
    config = coercion.build(values)
    if coercion.problems:
        raise ConfigError(_listed(f"{path}: the configuration cannot be used", coercion.problems))
    return config


def load_network(path: str | Path, overrides: Sequence[str] = ()) -> NetworkConfig:
    """The sections of a configuration that its weights depend on; the file may have others, and need not have them.

    Raises:
        ConfigError: as `load_config`.
    """
    return _load(path, overrides, NetworkConfig, skips_other_sections=True)


def load_lora(path: str | Path) -> LoraSection:
    """What a configuration says of adapters; otherwise as `load_network`."""
    return _load(path, (), LoraOnly, skips_other_sections=True).lora


def dump_toml(config: DataclassInstance) -> str:
    """The whole tree as TOML that `load_config` reads back to an equal tree; open ends of ranges are left out."""
    return "\n".join(_toml_lines(config, "")).strip() + "\n"


def _read_layers(path: Path) -> list[tuple[str, dict[str, object]]]:
    """The file as a layer, preceded by those it extends, the first of them first."""
    layers: list[tuple[str, dict[str, object]]] = []
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        values = _read_toml(path)
        extended = values.pop("extends", None)
        layers.insert(0, (str(path), values))
        if extended is None:
            return layers
        if not isinstance(extended, str):
            raise ConfigError(
                f"{path}: extends = {extended!r}: expected one TOML file, relative to this one, or the name of one "
                "that comes with the package"
            )
        base = path.parent / extended
        if not base.is_file():
            base = config_path(extended)
        if not base.is_file():
            raise ConfigError(
                f"{path}: extends = {extended!r}: there is no file {path.parent / extended}, and no configuration of "
                f"this name comes with the package ({', '.join(shipped_configs())}); correct it"
            )
        if base.resolve() in seen:
            raise ConfigError(f"{path}: extends = {extended!r}: that file extends this one; remove one of the two")
        path = base


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_utf8(path))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({error.strerror}); name a TOML file, or one that comes with the "
            f"package: {', '.join(shipped_configs())}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(key.isidentifier() for key in keys):
            raise ConfigError(f"{_COMMAND_LINE}: {override!r}: expected section.key=value, such as run.steps=100")
        table = values
        for key in keys[:-1]:
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{_COMMAND_LINE}: {override!r}: an override before it sets {key!r} to a value")
            table = inner
        table[keys[-1]] = _parse_value(text.strip())
    return values


def _parse_value(text: str) -> object:
    try:
        document = tomllib.loads(f"value = {text}")
    except ValueError:
        # No TOML, or an integer of more digits than Python reads.
        return text
    # A line break inside the text could smuggle in further keys.
    return document["value"] if len(document) == 1 else text


def _merge(
    values: dict[str, object],
    layer: Mapping[str, object],
    source: str,
    sources: dict[tuple[str, ...], str],
    path: tuple[str, ...],
) -> None:
    """Lays a layer over the values, in place, and notes where each came from."""
    for key, value in layer.items():
        key_path = (*path, key)
        sources[key_path] = source
        if isinstance(value, dict):
            below = values.get(key)
            merged = below if isinstance(below, dict) else {}
            values[key] = merged
            _merge(merged, value, source, sources, key_path)
        else:
            values[key] = value


def _fill_in_preset(values: dict[str, object], schema: type, sources: Mapping[tuple[str, ...], str]) -> None:
    """Puts the preset's settings where no layer has set one; a schema without a backbone has no presets."""
    model = values.get("model")
    if field_types(schema).get("model") is not ModelSection or not isinstance(model, dict):
        return
    name = model.get("preset", "")
    if not isinstance(name, str) or not name:
        return
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(
            f"{sources[('model', 'preset')]}: model.preset = {name!r}: there is no such preset; "
            f"{hint}Presets: {', '.join(PRESETS)}"
        )
    for section, settings in PRESETS[name].items():
        table = values.setdefault(section, {})
        if isinstance(table, dict):
            for key, value in settings.items():
                table.setdefault(key, value)


def _toml_lines(table: DataclassInstance, prefix: str) -> list[str]:
    """A dataclass as TOML: its own values first, then its tables and lists of tables under their headers."""
    own, below = [], []
    for key, value in written_fields(table):
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            below += ["", f"[{name}]", *_toml_lines(value, f"{name}.")]
        elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
            for item in value:
                below += ["", f"[[{name}]]", *_toml_lines(item, f"{name}.")]
        else:
            own.append(f"{key} = {toml_value(value)}")
    return own + below


def _listed(heading: str, problems: Sequence[str]) -> str:
    return "\n".join([f"{heading}:", *(f"- {problem}" for problem in problems)])
