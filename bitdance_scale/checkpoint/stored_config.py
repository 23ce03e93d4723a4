"""The configuration of a checkpoint: that of its run; of an import, whose own has a network alone, a recipe's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, TENSORS_DIR, has_averages
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.config.class_map import CLASSES_FILE
from bitdance_scale.config.load import load_config, load_network, section_names
from bitdance_scale.config.published_class import published_recipe
from bitdance_scale.config.schema import NetworkConfig, RunConfig
from bitdance_scale.errors import ConfigError


def stored_config(checkpoint: Path, overrides: Sequence[str], named: str | None = None) -> RunConfig:
    """The configuration of a checkpoint, with overrides; rules are not checked.

    A class map that is gone is that of the run's folder. An import takes the settings of a run from the shipped recipe
    of its network, if it is a published class-conditional one; it draws with its averages if it has them.

    Args:
        checkpoint: committed.
        overrides: `section.key=value`.
        named: configuration that gives an import the settings of a run; None: the shipped recipe.

    Raises:
        ConfigError: a configuration cannot be used; an import has no recipe and none is named; a run has its own.
        CheckpointError: the import is damaged.
    """
    path = checkpoint / CONFIG_NAME
    if "optim" in section_names(path):
        if named is not None:
            raise ConfigError(f"--config {named}: {checkpoint} is of a run, which has its own; leave --config out")
        return _with_kept_classes(load_config(path, overrides), checkpoint)
    network = load_network(path, overrides)
    recipe = named or published_recipe(network)
    if recipe is None:
        raise ConfigError(
            f"{checkpoint}: is an import, which has no settings of a run, and none of the shipped recipes is of its "
            "network; name a configuration that has them with --config, such as one that trains on from it"
        )
    config = load_config(recipe, overrides)
    weights = "averaged" if has_averages(read_index(checkpoint / TENSORS_DIR)) else "trained"
    sections = {field.name: getattr(network, field.name) for field in dataclasses.fields(NetworkConfig)}
    return dataclasses.replace(config, **sections, sample=dataclasses.replace(config.sample, weights=weights))


def _with_kept_classes(config: RunConfig, checkpoint: Path) -> RunConfig:
    kept = checkpoint.absolute().parents[1] / CLASSES_FILE
    if not config.classes.map or config.classes.map_path.is_file() or not kept.is_file():
        return config
    return dataclasses.replace(config, classes=dataclasses.replace(config.classes, map=str(kept)))
