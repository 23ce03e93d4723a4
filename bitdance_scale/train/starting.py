"""The weights that a network begins with: those of another run or release, and adapters.

A run with adapters reads the frozen weights from its start whenever it begins, as its checkpoints have what is trained
alone. They must be the same ones every time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bitdance_scale.checkpoint.frozen_base import FrozenBase, check_base_digest, digest_of, fetched_base
from bitdance_scale.checkpoint.remote_folder import is_remote
from bitdance_scale.checkpoint.remote_restore import fetch_start
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, read_state
from bitdance_scale.checkpoint.start_weights import find_checkpoint, load_start_weights
from bitdance_scale.config.coerce import toml_value
from bitdance_scale.config.load import load_lora
from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.adaptable import is_added, is_trained
from bitdance_scale.model.adapter_folder import is_adapter_folder
from bitdance_scale.parallel.agreement import on_first_rank
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.partition import ConsumedValue, ShardedValue
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.train.start_adapters import fill_from_folder
from bitdance_scale.train.start_checks import Start, check_start

logger = logging.getLogger(__name__)

Value = TypeVar("Value", bound=ShardedValue | ConsumedValue)

_MASTER = "master."
SAME = ("rank", "alpha", "rank_stabilized", "targets", "train_projector", "train_queries")
"""Settings of `lora` that decide which adapters there are and what they compute."""


@dataclass(frozen=True)
class Base:
    """The weights that a network begins with.

    Attributes:
        start: the checkpoint.
        digest: tells it from others.
    """

    start: Start
    digest: str


def find_base(config: RunConfig, run_folder: Path, vision_digest: str, adapters: Path | None = None) -> Base:
    """What `run.start_from` means, and whether the run can start from it; a collective.

    Args:
        config: the run.
        run_folder: its folder.
        vision_digest: of its vision tokenizer.
        adapters: its own checkpoint, of adapters, that is to be loaded beside the start; None: a run that begins. S3 is
            not asked for what the folder has: the copy may be gone, and `run.start_from` may mean a later one by now.

    Raises:
        BitDanceError: on every rank: it cannot.
    """
    where, weights = config.run.start_from, config.run.start_weights
    path: Path | None = None
    if not is_remote(where):
        path = find_checkpoint(where)
    elif adapters is not None:
        path = on_first_rank(lambda: fetched_base(adapters, read_state(adapters), weights))
    found = path or fetch_start(where, config.checkpoint, run_folder, weights=weights)
    return on_first_rank(lambda: Base(check_start(found, config, vision_digest), digest_of(found)))


def load_base(engine: TrainingEngine, base: Base, config: RunConfig) -> dict[str, Any]:
    """Fills the network from its start, adapters left out; a collective.

    Returns:
        What the start says of the release that its weights came from.
    """
    masters = of_network(_masters(engine))
    release = load_start_weights(
        base.start.path,
        of_network(engine.start_values()),
        # None on all ranks, as only the first stage has the projector.
        masters if config.lora.train_projector or not config.lora.is_used else None,
        tokenizer_digest=base.start.tokenizer_digest,
        weights=config.run.start_weights,
        new_queries=base.start.new_queries,
        is_partial=base.start.is_partial,
        unread=functools.partial(_has_no_master, config.lora) if config.lora.is_used else None,
    )
    engine.restart_averages()
    logger.info("started from the weights of %s (%s)", base.start.path, config.run.start_weights)
    return release


def load_adapters(engine: TrainingEngine, base: Base, config: RunConfig, condition: Condition) -> None:
    """Fills what is trained from the run, or the folder of adapters, that `lora.start_from` names; a collective.

    Raises:
        ConfigError: on every rank: its adapters are others.
        CheckpointError: on every rank: it is damaged, or of other frozen weights.
    """
    path = Path(config.lora.start_from)
    values, masters = engine.trained_values(), _masters(engine)
    if on_first_rank(lambda: is_adapter_folder(path)):
        frozen = FrozenBase(base.start.path, config.run.start_weights, str(base.start.path))
        fill_from_folder(path, (values, masters), frozen, config, condition.vocab_size)
    else:
        path = find_checkpoint(path)
        on_first_rank(lambda: _check_adapters(path, config, base))
        load_start_weights(path, values, masters, tokenizer_digest=condition.digest)
    engine.restart_averages()
    logger.info("went on from the adapters of %s", path)


def check_base(path: Path, base: Base) -> None:
    """Compares the frozen weights that the adapters of a checkpoint were trained beside with those of a start.

    Raises:
        CheckpointError: the checkpoint is damaged, or they are others.
    """
    check_base_digest(path, read_state(path), base.start.path, base.digest)


def _check_adapters(path: Path, config: RunConfig, base: Base) -> None:
    """Whether a run may go on from the adapters of a checkpoint."""
    found, wanted = load_lora(path / CONFIG_NAME), config.lora
    if not found.is_used:
        raise ConfigError(
            f"lora.start_from = {wanted.start_from!r}: a run without adapters; name it in run.start_from instead"
        )
    for name in SAME:
        old, new = getattr(found, name), getattr(wanted, name)
        if old != new:
            reason = (
                "matrices of another rank cannot go on from these" if name == "rank" else "they would be other adapters"
            )
            raise ConfigError(
                f"lora.{name} = {toml_value(new)}: the adapters of {path} have {toml_value(old)}, and {reason}. "
                f"Set lora.{name}={toml_value(old)}; or export that run with its adapters merged (bitdance export "
                "--merge), import it, and begin with new ones on it (run.start_from)"
            )
    check_base(path, base)


def _masters(engine: TrainingEngine) -> Mapping[str, ShardedValue]:
    values = engine.optimizer_values()
    return {name.removeprefix(_MASTER): value for name, value in values.items() if name.startswith(_MASTER)}


def of_network(values: Mapping[str, Value]) -> dict[str, Value]:
    """Those of some parameters that a network without adapters has."""
    return {name: value for name, value in values.items() if not is_added(name)}


def _has_no_master(section: LoraSection, name: str) -> bool:
    return not is_trained(name, section)
