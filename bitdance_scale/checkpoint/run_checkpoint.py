"""What one checkpoint holds, and saving and loading the whole of it.

config.toml        the resolved configuration of the run
train_state.json   how far the run is: step, counts, position in the data, optimiser counters
tensors/           `model.<name>`, the parameters in their training dtype, and `optimizer.<kind>.<name>`, the
                   float32 masters and moments; by global names, in boxes that do not depend on the layout
manifest.json      every file with its size and digest (those of tensor files are in tensors/index.json)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist

import bitdance_scale
from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import find_damage, text_digest
from bitdance_scale.checkpoint.sharded import StreamedValue, load_sharded, save_sharded
from bitdance_scale.checkpoint.step_names import step_of
from bitdance_scale.checkpoint.tensor_index import TensorIndex, read_index
from bitdance_scale.errors import CheckpointError, DamagedCheckpointError, DiskFullError
from bitdance_scale.parallel.agreement import on_first_rank
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.renames import EARLIER_VALUES, RENAMED_FIELDS, with_new_names

TENSORS_DIR = "tensors"
CONFIG_NAME = "config.toml"
TRAIN_STATE_NAME = "train_state.json"
MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
MASTER_PREFIX, AVERAGE_PREFIX = f"{OPTIMIZER_PREFIX}master.", f"{OPTIMIZER_PREFIX}average."

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepState:
    """How far a run is, apart from its tensors; the same on all ranks. Every job adds fields of JSON values.

    Attributes:
        step: optimiser steps taken.
    """

    step: int


State = TypeVar("State", bound=StepState)


@dataclass(frozen=True)
class TrainState(StepState):
    """How far a text-to-image run is; the same under every layout.

    Attributes:
        step: optimiser steps taken.
        images: images seen.
        tokens: positions seen, padding left out.
        loader: state of the data loader after the last step; JSON values.
        optimizer: the optimiser's counters (steps counted for bias correction, steps skipped); JSON values.
        tokenizer_digest: digest of the text tokenizer; with other tokens the embedding rows would mean something else.
        images_by_resolution: images seen per resolution, by `side_px` as text (a JSON key).
        skipped_samples: samples that could not be used.
        sample_errors: samples with an error, by cause.
        release: what the release that the weights came from says and the configuration has no place for, so that an
            export writes it back (`checkpoint/export_release.py`); empty for weights that started at random. JSON
            values.
        guards: what the rules on skipped steps and spikes remember (`train/step_guards.py`); JSON values.
        vision_digest: digest of the vision tokenizer (`vision/tokenizer.py`), of whose bits the model is; empty in
            checkpoints of earlier versions.
        base_digest: of the checkpoint with the frozen weights (`base_digest`); empty where all weights are trained.
    """

    images: int
    tokens: int
    loader: dict[str, Any]
    optimizer: dict[str, Any]
    tokenizer_digest: str
    images_by_resolution: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped_samples: int = 0
    sample_errors: dict[str, int] = dataclasses.field(default_factory=dict)
    release: dict[str, Any] = dataclasses.field(default_factory=dict)
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)
    vision_digest: str = ""
    base_digest: str = ""


def save_checkpoint(
    folder: CheckpointFolder,
    state: StepState,
    model: Mapping[str, ShardedValue | StreamedValue],
    optimizer: Mapping[str, ShardedValue | StreamedValue],
    config_text: str,
) -> Path:
    """Writes and commits the checkpoint of `state.step`; a collective over the folder's group.

    If there is no room, it is tried once more without those old checkpoints that the commit would delete anyway.

    Args:
        folder: the checkpoints of the run.
        state: that of the first rank is written.
        model: what this rank holds of the parameters, by global name.
        optimizer: what this rank holds of `master.<name>`, `exp_avg.<name>` and `exp_avg_sq.<name>`.
        config_text: the resolved configuration as TOML.

    Returns:
        The committed checkpoint.

    Raises:
        DiskFullError: on every rank: there is no room; the last checkpoint is as it was.
        CheckpointError: on every rank; earlier checkpoints are as they were.
    """
    values = _prefixed(MODEL_PREFIX, model) | _prefixed(OPTIMIZER_PREFIX, optimizer)

    def write() -> Path:
        with folder.write(state.step) as path:
            save_sharded(path / TENSORS_DIR, values, folder.group)
            on_first_rank(lambda: _write_texts(path, state, config_text), folder.group, other=CheckpointError)
        return folder.path_of(state.step)

    try:
        return write()
    except DiskFullError as error:
        if not folder.make_room(state.step):
            raise
        logger.warning("%s; trying again", error)
        return write()


def load_checkpoint(
    path: Path,
    model: Mapping[str, ShardedValue],
    optimizer: Mapping[str, ShardedValue],
    *,
    tokenizer_digest: str,
    vision_digest: str = "",
    group: dist.ProcessGroup | None = None,
) -> TrainState:
    """Fills the pieces of a model and of its optimiser in place from a committed checkpoint; a collective.

    Args:
        path: the checkpoint, such as `CheckpointFolder.latest` returns.
        model: what this rank holds of the parameters.
        optimizer: what this rank holds of the optimiser state.
        tokenizer_digest: of the text tokenizer in use.
        vision_digest: of the vision tokenizer in use; empty: not compared.
        group: the ranks that take part; None: all, or this process alone without a process group.

    Raises:
        CheckpointError: on every rank, before any tensor is written to: the checkpoint is damaged, of another model or
            of another text or vision tokenizer.
    """
    state = on_first_rank(
        lambda: read_fitting_state(path, tokenizer_digest, vision_digest), group, other=CheckpointError
    )
    load_tensors(path, model, optimizer, group)
    return state


def load_tensors(
    path: Path,
    model: Mapping[str, ShardedValue],
    optimizer: Mapping[str, ShardedValue],
    group: dist.ProcessGroup | None = None,
) -> None:
    """The tensors of `load_checkpoint`, for jobs whose state is not a `TrainState`.

    Averaged weights that the checkpoint lacks begin with its masters, or with its weights where there are no masters;
    those that nothing holds now are left out.
    """
    values = _prefixed(MODEL_PREFIX, model) | _prefixed(OPTIMIZER_PREFIX, optimizer)
    averages = {name: value for name, value in values.items() if name.startswith(AVERAGE_PREFIX)}
    is_stored = on_first_rank(lambda: has_averages(read_index(path / TENSORS_DIR)), group, other=CheckpointError)
    if not (averages and is_stored):
        values = {name: value for name, value in values.items() if name not in averages}
    unread = None if averages else (lambda name: name.startswith(AVERAGE_PREFIX))
    load_sharded(path / TENSORS_DIR, values, group, unread=unread)
    if averages and not is_stored:
        logger.info("%s has no averaged weights: the average begins with its weights", path)
        for name, average in averages.items():
            trained = name.removeprefix(AVERAGE_PREFIX)
            source = values.get(MASTER_PREFIX + trained) or values[MODEL_PREFIX + trained]
            if not average.pieces:
                continue
            for piece, other in zip(average.pieces, source.pieces, strict=True):
                piece.tensor.copy_(other.tensor)


def has_averages(index: TensorIndex) -> bool:
    """Whether a checkpoint has averaged weights."""
    return any(name.startswith(AVERAGE_PREFIX) for name in index.tensors)


def model_signature(index: TensorIndex) -> str:
    """SHA-256 of the names and shapes of a checkpoint's parameters; checkpoints of one network have the same."""
    shapes = {
        name.removeprefix(MODEL_PREFIX): list(tensor.size)
        for name, tensor in index.tensors.items()
        if name.startswith(MODEL_PREFIX)
    }
    return text_digest(json.dumps(shapes, sort_keys=True))


def _prefixed(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    return {prefix + name: value for name, value in values.items()}


def _write_texts(path: Path, state: StepState, config_text: str) -> None:
    content = dataclasses.asdict(state) | {
        "config_sha256": text_digest(config_text),
        "model_signature": model_signature(read_index(path / TENSORS_DIR)),
        "versions": {"bitdance_scale": bitdance_scale.__version__, "torch": torch.__version__},
    }
    write_text(path / TRAIN_STATE_NAME, json.dumps(content, indent=1))
    write_text(path / CONFIG_NAME, config_text)


def read_section(path: Path, name: str) -> dict[str, Any]:
    """A section of a checkpoint's configuration as it is stored; empty if it has none."""
    section: dict[str, Any] = tomllib.loads((path / CONFIG_NAME).read_text(encoding="utf-8")).get(name, {})
    return section


def read_run_section(path: Path) -> dict[str, Any]:
    """The [run] section of a checkpoint's configuration; that of an import has no steps, name or stage."""
    return read_section(path, "run")


def earlier_context(path: Path) -> str | None:
    """`vision.context` of a run of a version that did not have it; None: the configuration says it, or is no run's."""
    tables = tomllib.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    if "steps" not in tables.get("run", {}) or "context" in tables.get("vision", {}):
        return None
    return str(EARLIER_VALUES["vision.context"])


def read_state(path: Path, tensor_files: Collection[str] | None = None) -> TrainState:
    """How far the text-to-image run of a committed checkpoint is; otherwise as `read_state_of`."""
    return read_state_of(path, TrainState, tensor_files)


def read_state_of(path: Path, kind: type[State], tensor_files: Collection[str] | None = None) -> State:
    """How far the run of a committed checkpoint is; all files but the tensors are compared with their digests.

    Args:
        path: the checkpoint.
        kind: what its job keeps.
        tensor_files: the tensor files that must be there, as `find_damage` takes them; None: all.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    damage = find_damage(path, tensor_files)
    if damage is not None:
        raise DamagedCheckpointError(f"{path}: {damage}; load another checkpoint")
    file = path / TRAIN_STATE_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        old = {name: RENAMED_FIELDS[name] for name in content if name in RENAMED_FIELDS}
        if old:
            named = ", ".join(f"{name} is now {new}" for name, new in old.items())
            logger.info("%s was written by an earlier version (%s); it is read under the new names", file, named)
            content = with_new_names(content, RENAMED_FIELDS)
        # Earlier versions did not write these fields; weights whose release is not stated started at random.
        content = {"sample_errors": {}, "release": {}, "guards": {}, "vision_digest": "", "base_digest": ""} | content
        state = kind(**{field.name: content[field.name] for field in dataclasses.fields(kind)})
        _check_values(path, state)
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{file}: damaged ({type(error).__name__}: {error}); load another checkpoint"
        ) from error


def _check_values(path: Path, state: StepState) -> None:
    """Raises ValueError where a field is of another type, a count is negative, or the step is not the folder's."""
    hints = get_type_hints(type(state))
    for field in dataclasses.fields(state):
        _check_value(field.name, getattr(state, field.name), hints[field.name])
    if isinstance(state, TrainState):
        for name in ("step", "skipped_steps"):
            # Some checkpoints that tests and tools write have no optimiser.
            _check_value(f"optimizer.{name}", state.optimizer.get(name, 0), int)
        for side_px in state.images_by_resolution:
            if not side_px.isdecimal():
                raise ValueError(f"images_by_resolution has {side_px!r}, expected a side in pixels")
    named = step_of(path.name)
    if named is not None and named != state.step:
        raise ValueError(f"step is {state.step}, but the checkpoint is {path.name}")


def _check_value(name: str, value: object, hint: Any) -> None:
    kind = get_origin(hint) or hint
    is_kind = isinstance(value, kind) and not isinstance(value, bool)
    if not is_kind or (isinstance(value, int) and value < 0):
        wanted = "a count" if kind is int else f"of type {kind.__name__}"
        raise ValueError(f"{name} is {value!r}, expected {wanted}")
    if kind is dict and get_args(hint)[1] is int:
        for key, count in value.items():  # type: ignore[attr-defined]  # a dict, as was just seen
            _check_value(f"{name}.{key}", count, int)


def read_fitting_state(
    path: Path, tokenizer_digest: str, vision_digest: str = "", tensor_files: Collection[str] | None = None
) -> TrainState:
    """How far the run of a committed checkpoint is, as `read_state`; the run must have used these tokenizers.

    Args:
        path: the checkpoint.
        tokenizer_digest: of the text tokenizer.
        vision_digest: of the vision tokenizer; empty: not compared.
        tensor_files: as for `read_state`.

    Raises:
        CheckpointError: the checkpoint is damaged, or its run used another text or vision tokenizer.
    """
    state = read_state(path, tensor_files)
    if state.tokenizer_digest != tokenizer_digest:
        raise CheckpointError(
            f"{path}: trained with another text tokenizer (digest {state.tokenizer_digest}, in use "
            f"{tokenizer_digest}); set [text] as in {path / CONFIG_NAME}"
        )
    if vision_digest:
        check_vision(path, state, vision_digest)
    return state


def check_vision(path: Path, state: TrainState, vision_digest: str) -> None:
    """Compares the vision tokenizer of a checkpoint's run with the one in use; an earlier version's is unknown.

    Raises:
        CheckpointError: they differ.
    """
    if not state.vision_digest:
        logger.warning(
            "%s does not say which vision tokenizer it was trained with (an earlier version wrote it): make sure that "
            "vision.weights is the same file",
            path,
        )
    elif state.vision_digest != vision_digest:
        raise CheckpointError(
            f"{path}: trained with another vision tokenizer (digest {state.vision_digest}, in use {vision_digest}): "
            f"its bits would mean something else; set [vision] as in {path / CONFIG_NAME}, with the weights of then"
        )
