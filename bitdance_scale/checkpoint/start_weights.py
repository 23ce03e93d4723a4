"""Weights of one run as the start of another: any layout, any dtype; optimiser, schedule and counters begin anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import Metadata

from bitdance_scale.checkpoint.checkpoint_folder import LATEST_NAME, CheckpointFolder
from bitdance_scale.checkpoint.manifest import MANIFEST_NAME
from bitdance_scale.checkpoint.new_rows import NewQueries, fill_rows, first_rows
from bitdance_scale.checkpoint.published_names import EMBEDDING, OUTPUT, our_tensors
from bitdance_scale.checkpoint.run_checkpoint import (
    MASTER_PREFIX,
    MODEL_PREFIX,
    TENSORS_DIR,
    read_fitting_state,
)
from bitdance_scale.checkpoint.sharded import load_sharded
from bitdance_scale.checkpoint.stored_tensors import StoredTensors
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.config.published_config import MODEL_CONFIG_NAME
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.weight_files import TensorSpec, check_tensors

CHECKPOINTS_DIR = "checkpoints"


def find_checkpoint(where: str | Path, group: dist.ProcessGroup | None = None) -> Path:
    """The checkpoint that a path means; a collective over `group`.

    Args:
        where: a checkpoint (`step_00001000`), a folder of checkpoints, or a run folder or converted release, whose
            `latest` is taken.
        group: the ranks that ask; None: all, or this process alone without a process group.

    Raises:
        CheckpointError: on every rank: there is none, or it is damaged.
    """
    where = Path(where)
    return on_first_rank(lambda: _find(where), group, other=CheckpointError) or _latest(where, group)


def check_network(path: Path, index: Metadata, network: NetworkConfig, vocab_size: int) -> None:
    """Compares the parameters that a checkpoint holds with those of a network, by name and shape.

    Raises:
        CheckpointError: they differ; names the first three.
    """
    found = {
        name.removeprefix(MODEL_PREFIX): TensorSpec(tuple(tensor.size), tensor.properties.dtype)
        for name, tensor in index.state_dict_metadata.items()
        if name.startswith(MODEL_PREFIX)
    }
    wanted = {tensor.name: tensor.shape for tensor in our_tensors(network, vocab_size)}
    fix = "Set [model], [head], vision.num_bits, vision.block_side and [text] as in its config.toml"
    check_tensors(path, found, wanted, fix)


def load_weights(
    path: Path,
    model: Mapping[str, ShardedValue],
    masters: Mapping[str, ShardedValue],
    *,
    tokenizer_digest: str,
    new_queries: NewQueries | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fills the weights of a model and their float32 masters in place from a checkpoint; a collective.

    Both come from the checkpoint's masters, or, where it has none (a converted release), from its weights as stored.

    Args:
        path: a committed checkpoint.
        model: what this rank holds of the parameters, by global name, in any dtype.
        masters: what it holds of their float32 masters.
        tokenizer_digest: of the text tokenizer that the checkpoint must have been trained with.
        new_queries: query tokens that the checkpoint lacks; None: none.
        group: the ranks that take part; None: all, or this process alone without a process group.

    Returns:
        What the checkpoint says of the release that its weights came from (`TrainState.release`).

    Raises:
        CheckpointError: on every rank, before any tensor is written to: the checkpoint is damaged, of another model or
            of another text tokenizer.
    """
    state = on_first_rank(lambda: read_fitting_state(path, tokenizer_digest), group, other=CheckpointError)
    tensors = path / TENSORS_DIR
    index = on_first_rank(lambda: read_index(tensors), group, other=CheckpointError)
    has_masters = any(name.startswith(MASTER_PREFIX) for name in index.state_dict_metadata)
    prefix = MASTER_PREFIX if has_masters else MODEL_PREFIX
    for values, is_verified in ((model, False), (masters, True)):
        wanted = {prefix + name: _known_rows(name, value, new_queries) for name, value in values.items()}
        load_sharded(tensors, wanted, group, prefix=prefix, converts_dtype=True, is_verified=is_verified)
    if new_queries is not None:
        # Small reads that every rank makes; where one fails, the file system has failed between two reads of one file.
        with all_ranks(group, other=CheckpointError):
            _fill_new_rows(StoredTensors(tensors), prefix, (model, masters), new_queries)
    return state.release


def _known_rows(name: str, value: ShardedValue, new_queries: NewQueries | None) -> ShardedValue:
    """What the checkpoint has of a value."""
    if new_queries is None or name not in (EMBEDDING, OUTPUT):
        return value
    return first_rows(value, new_queries.num_old_rows)


def _fill_new_rows(
    stored: StoredTensors, prefix: str, groups: Sequence[Mapping[str, ShardedValue]], new_queries: NewQueries
) -> None:
    num_old = new_queries.num_old_rows
    for name in (EMBEDDING, OUTPUT):
        if prefix + name in stored:
            trained = stored.read_rows(prefix + name, num_old - new_queries.num_trained, num_old)
            rows = new_queries.rows(name, trained)
            for values in groups:
                if name in values:
                    fill_rows(values[name], num_old, rows)


def _find(where: Path) -> Path | None:
    """The checkpoint itself, or None where `where` is a folder of checkpoints."""
    if (where / MANIFEST_NAME).is_file():
        return where
    if _checkpoints(where).is_dir():
        return None
    if (where / MODEL_CONFIG_NAME).is_file():
        fix = "it is a Hugging Face folder: convert it with tools/convert_from_hf.py first"
    else:
        fix = "name a run folder, a converted release or one checkpoint of them (checkpoints/step_...)"
    raise CheckpointError(f"{where}: no checkpoint is there; {fix}")


def _checkpoints(where: Path) -> Path:
    return where if (where / LATEST_NAME).is_file() else where / CHECKPOINTS_DIR


def _latest(where: Path, group: dist.ProcessGroup | None) -> Path:
    root = on_first_rank(lambda: _checkpoints(where), group, other=CheckpointError)
    latest = CheckpointFolder(root, keep=1, group=group).latest()
    if latest is None:
        raise CheckpointError(f"{root}: no checkpoint was committed there; name a run that has saved one")
    return latest
