"""Adapters that a user names: a folder of them, or a run with adapters, and how much of them shall act."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.checkpoint.run_adapters import open_run_adapters
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.model.adapter_folder import is_adapter_folder, open_adapter_folder
from bitdance_scale.model.adapter_source import WeightedAdapter


def parse_adapters(texts: Sequence[str]) -> list[WeightedAdapter]:
    """The adapters that `--adapter FOLDER[=WEIGHT]` names, opened and checked by themselves; no weights are loaded.

    They go to `BitDancePipeline.from_pretrained`, which compares them with the model.

    Args:
        texts: FOLDER or FOLDER=WEIGHT each; a weight of 1 is what was trained. A run, or a checkpoint of it, may stand
            in place of the folder.

    Raises:
        ConfigError: a weight is no finite number, or there is nothing of that name.
        CheckpointError: there are no adapters in it, or they are damaged.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> WeightedAdapter:
    path, weight = Path(text), 1.0
    if not path.exists() and "=" in text:
        name, _, number = text.rpartition("=")
        path, weight = Path(name), _weight(text, number)
    if not path.exists():
        raise ConfigError(f"--adapter {text}: there is no {path}; name a folder of adapters, or a run with adapters")
    if is_adapter_folder(path):
        return WeightedAdapter(open_adapter_folder(path), weight)
    try:
        return WeightedAdapter(open_run_adapters(path).source, weight)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"--adapter {text}: {error}") from error


def _weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"--adapter {text}: {number!r} is no finite number; write FOLDER=0.8, or FOLDER alone for 1")
    return weight
