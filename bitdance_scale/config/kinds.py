"""The kinds of training that a configuration may be for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bitdance_scale.config.coerce import field_types
from bitdance_scale.config.load import load_config, section_names
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.tokenizer_rules import check_tokenizer
from bitdance_scale.config.tokenizer_schema import TokenizerConfig

AnyConfig = RunConfig | TokenizerConfig

KINDS: Mapping[type[RunConfig] | type[TokenizerConfig], str] = {
    RunConfig: "text-to-image training",
    TokenizerConfig: "training of the visual tokenizer",
}
"""Schema -> what it configures."""


def kind_of(path: str | Path) -> type[RunConfig] | type[TokenizerConfig]:
    """The schema that most sections of a file, and of those it extends, belong to.

    Raises:
        ConfigError: a file cannot be read or is no TOML.
    """
    sections = section_names(path)
    return max(KINDS, key=lambda schema: len(sections & field_types(schema).keys()))


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Loads a configuration of whichever kind it is; otherwise as `load_config`."""
    if kind_of(path) is TokenizerConfig:
        return load_config(path, overrides, schema=TokenizerConfig)
    return load_config(path, overrides)


def check_any(config: AnyConfig, world_size: int | None) -> None:
    """Refuses a configuration that cannot be trained; `world_size` as in `rules.check`.

    Raises:
        ConfigError: lists every violation with the setting, its value, the rule and how to fix it.
    """
    if isinstance(config, RunConfig):
        check(config, world_size)
    else:
        check_tokenizer(config, world_size)


def shards_of(config: AnyConfig) -> list[str]:
    """Everything that a configuration names as shards, to train on or held out."""
    if isinstance(config, RunConfig):
        sources = [spec for source in config.data.active_sources for spec in source.shards]
        return [*([] if config.data.bits_dir else sources), *config.evaluate.shards]
    return [*config.data.shards, *config.evaluate.shards]
