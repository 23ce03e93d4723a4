"""Which configurations are the stages of one recipe, by the names of their files."""

from __future__ import annotations

from pathlib import Path

from bitdance_scale.config.shipped import config_path
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import ConfigError


def recipe_configs(config: str) -> list[str]:
    """The configurations of all stages of the recipe that one of them belongs to, in the order of training.

    They lie beside each other and are called STAGE_NAME.toml; pretraining may be NAME.toml. So `pt_14b` is followed by
    `ct_14b`, `sft_14b` and `distill_14b`, and `demo` by `ct_demo` and so on.

    Raises:
        ConfigError: one of them is missing.
    """
    path = config_path(config)
    prefix, _, rest = path.stem.partition("_")
    name = rest if prefix in STAGES and rest else path.stem
    found, missing = [], []
    for stage, entry in STAGES.items():
        names = [f"{stage}_{name}", *([] if entry.follows else [name])]
        files = [path.with_name(f"{candidate}.toml") for candidate in names]
        existing = next((file for file in files if file.is_file()), None)
        if existing is None:
            missing.append(files[0].name)
        else:
            found.append(existing)
    if missing:
        raise ConfigError(
            f"--stage all: {config} lies beside no {', '.join(missing)}; the stages of a recipe are called "
            f"{', '.join(f'{stage}_{name}.toml' for stage in STAGES)}. Plan the stages that there are one by one."
        )
    return [_as_given(file, config) for file in found]


def _as_given(file: Path, config: str) -> str:
    """A shipped configuration by its name, another by its path."""
    return str(file) if Path(config).is_file() else file.stem
