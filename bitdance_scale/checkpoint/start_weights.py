"""Weights of one run as the start of another, in any layout and dtype; optimiser, schedule and counters start again.

A start may lack query tokens. The release distils blocks of 16 tokens into blocks of 64 (arXiv 2602.14041 Sec. 4.3):
the 15 trained query tokens stay, and 48 follow them in the vocabulary. How the new embedding rows are initialised is
not published; the rules here are `run.new_queries`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import MANIFEST_NAME
from bitdance_scale.checkpoint.run_checkpoint import (
    AVERAGE_PREFIX,
    CONFIG_NAME,
    MASTER_PREFIX,
    MODEL_PREFIX,
    TENSORS_DIR,
    has_averages,
    read_fitting_state,
)
from bitdance_scale.checkpoint.sharded import load_sharded
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR, LATEST_NAME, step_of
from bitdance_scale.checkpoint.tensor_index import TensorIndex, read_index
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.published_backbone import MODEL_CONFIG_NAME
from bitdance_scale.config.published_class import PICKLE_NAME, SIZES_NAME
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.published_layout import INDEX_NAME, is_published
from bitdance_scale.model.initial import named_generator
from bitdance_scale.model.published_names import EMBEDDING, OUTPUT, our_tensors
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank
from bitdance_scale.parallel.partition import ConsumedValue, Piece, ShardedValue
from bitdance_scale.weight_files import PICKLED_SUFFIXES, check_tensors

WHERE_AVERAGES_ARE = (
    "Checkpoints of runs with optim.average_decay have them; an import has one set of weights, which may be averages"
)
_WAIT = "wait for the run's first (checkpoint.every_steps), or name a run that has saved one"
NEW_ROW_SPREAD = 0.1
"""Spread of rows that start around the mean of other rows, as a share of the spread of those rows."""


@dataclass(frozen=True)
class NewQueries:
    """Query tokens that a start lacks.

    Attributes:
        num_old_rows: rows of the start's embedding; the new rows follow.
        num_trained: query tokens of the start; their rows are its last.
        num_new: query tokens that it lacks.
        rule: repeat, mean or noise.
        seed: of the noise.
        init_std: standard deviation of rows that are noise.
    """

    num_old_rows: int
    num_trained: int
    num_new: int
    rule: str
    seed: int
    init_std: float

    def rows(self, name: str, trained: torch.Tensor) -> torch.Tensor:
        """The new rows of a table, float32 [num_new, D].

        repeat: the trained rows in turn, from the first. mean: their mean and normal noise of `NEW_ROW_SPREAD` times
        their spread, per channel. noise: normal, as the initial values of an embedding.

        Args:
            name: global name of the table; with the seed it decides the noise.
            trained: [num_trained, D], rows of the trained query tokens.
        """
        trained = trained.float()
        if self.rule == "repeat":
            return trained[torch.arange(self.num_new) % self.num_trained]
        noise = torch.randn(
            self.num_new, trained.shape[1], generator=named_generator(self.seed, f"new rows of {name}", "cpu")
        )
        if self.rule == "noise":
            return self.init_std * noise
        assert self.rule == "mean"
        return around_mean(trained.mean(dim=0), trained.std(dim=0, correction=0), noise)


def around_mean(mean: torch.Tensor, spread: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Rows [N, D] around a mean [D]: normal noise [N, D] times `NEW_ROW_SPREAD` of a spread [D]."""
    return mean + NEW_ROW_SPREAD * spread * noise


def find_checkpoint(where: str | Path, group: dist.ProcessGroup | None = None) -> Path:
    """The checkpoint that a path refers to; a collective over `group`.

    A command that takes published folders too asks `model_checkpoint`.

    Args:
        where: a checkpoint (`step_00001000`); or a folder of checkpoints, a run folder or an imported release, whose
            latest checkpoint is taken.
        group: the ranks that ask; None: all, or this process alone without a process group.

    Raises:
        CheckpointError: on every rank: there is none, or it is damaged.
    """
    where = Path(where)
    return on_first_rank(lambda: _find(where), group, other=CheckpointError) or _latest(where, group)


def model_checkpoint(
    model: Path, named: str = "MODEL", kinds: str = "a published folder, a run, a checkpoint or an import"
) -> Path | None:
    """The checkpoint of what a command is given as a model; None: it is a published text-to-image folder.

    Args:
        model: path of any kind.
        named: what the command calls it.
        kinds: what it takes, for the message.

    Raises:
        ConfigError: it is neither; says what else it is.
        CheckpointError: it is a run without a checkpoint yet, or damaged, or is to be imported first.
    """
    if is_published(model):
        return None
    if not model.exists():
        raise ConfigError(f"{named} {model}: no such folder; name {kinds}")
    if _way_out(model) is None and not ((model / MANIFEST_NAME).is_file() or _checkpoints(model).is_dir()):
        is_what = "is an empty folder" if model.is_dir() and not any(model.iterdir()) else "is no model"
        raise ConfigError(f"{named} {model}: {is_what}; name {kinds}, or demo, which comes with the package")
    return find_checkpoint(model)


def refuse_published_options(
    model: Path, adapters: Sequence[str] = (), dtype: str | None = None, device: str | None = None
) -> None:
    """Refuses options of a published folder for what is a checkpoint.

    Args:
        model: the path that was given.
        adapters: `FOLDER[=WEIGHT]` each.
        dtype: None: not given.
        device: None: not given.

    Raises:
        ConfigError: one is given; says what to write instead.
    """
    if adapters:
        raise ConfigError(
            f"--adapter {adapters[0]}: {model} is no published folder, and adapters are added to one; make it with "
            f"`bitdance export {model} FOLDER`"
        )
    if dtype is not None:
        raise ConfigError(f"--dtype {dtype}: {model} is no published folder; write run.dtype={dtype} instead")
    if device is not None:
        raise ConfigError(f"--device {device}: {model} is no published folder; leave it out")


def check_network(path: Path, index: TensorIndex, network: NetworkConfig, vocab_size: int) -> None:
    """Compares the parameters of a checkpoint with those of a network, by name and shape.

    Raises:
        CheckpointError: they differ; names the first three differences.
    """
    found = {
        name.removeprefix(MODEL_PREFIX): index.spec(name) for name in index.tensors if name.startswith(MODEL_PREFIX)
    }
    wanted = {tensor.name: tensor.shape for tensor in our_tensors(network, vocab_size)}
    fix = "Set [model], [head], vision.num_bits, vision.block_side and [text] as in its config.toml"
    check_tensors(path, found, wanted, fix)


def load_start_weights(
    path: Path,
    model: Mapping[str, ShardedValue | ConsumedValue],
    masters: Mapping[str, ShardedValue] | None,
    *,
    tokenizer_digest: str,
    weights: str = "trained",
    new_queries: NewQueries | None = None,
    is_partial: bool = False,
    unread: Callable[[str], bool] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fills the weights of a model and their float32 masters in place from a checkpoint; a collective.

    Both come from the checkpoint's masters, or from its averaged weights. An imported release has no masters; then both
    come from its weights as stored.

    Args:
        path: a committed checkpoint.
        model: what this rank holds of the parameters, or what takes them, by global name, in any dtype.
        masters: what this rank holds of their float32 masters; None: a model that is not trained, on all ranks.
        tokenizer_digest: of the text tokenizer that the checkpoint must have been trained with.
        weights: `run.start_weights`: trained or averaged.
        new_queries: query tokens that the checkpoint lacks; None: none.
        is_partial: whether the checkpoint was fetched for a start, so that tensor files without these weights may be
            missing.
        unread: whether a parameter, by its name, has no master here although the checkpoint has one; None: all that
            the checkpoint has are held.
        group: the ranks that take part; None: all, or this process alone without a process group.

    Returns:
        What the checkpoint says of the release that its weights came from (`TrainState.release`).

    Raises:
        CheckpointError: on every rank, before any tensor is written to: the checkpoint is damaged, of another model or
            of another text tokenizer, or has no averaged weights where they are asked for.
    """
    tensors = path / TENSORS_DIR
    index = on_first_rank(lambda: read_index(tensors), group, other=CheckpointError)
    prefix = start_prefix(path, index, weights)
    files = start_files(path, index, weights) if is_partial else None
    read = functools.partial(read_fitting_state, path, tokenizer_digest, tensor_files=files)
    state = on_first_rank(read, group, other=CheckpointError)
    is_unread = None if unread is None else (lambda name: unread(name.removeprefix(prefix)))
    for values, skips, is_verified in ((model, None, False), (masters, is_unread, True)):
        if values is None:
            continue
        wanted = {prefix + name: _known_rows(name, value, new_queries) for name, value in values.items()}
        load_sharded(tensors, wanted, group, prefix=prefix, converts_dtype=True, is_verified=is_verified, unread=skips)
    if new_queries is not None:
        # Every rank reads these few rows itself. The files were read just before, so only a device can fail here.
        with all_ranks(group, other=CheckpointError):
            _fill_new_rows(StoredTensors(tensors, prefix), prefix, (model, masters or {}), new_queries)
    return state.release


def start_prefix(where: str | Path, index: TensorIndex, weights: str) -> str:
    """What the names of the tensors begin with that a start takes.

    Args:
        where: the checkpoint, for the message.
        index: its tensors.
        weights: trained (the masters, or the weights where there are none) or averaged.

    Raises:
        CheckpointError: the weights are to be averaged, and it has no averages.
    """
    if weights == "averaged":
        if not has_averages(index):
            raise CheckpointError(
                f"run.start_weights = 'averaged': {where} has no averaged weights. {WHERE_AVERAGES_ARE}; set "
                "run.start_weights=trained, or name another start"
            )
        return AVERAGE_PREFIX
    return MASTER_PREFIX if any(name.startswith(MASTER_PREFIX) for name in index.tensors) else MODEL_PREFIX


def chosen_weights(path: Path, index: TensorIndex, asked: str | None) -> str:
    """Which weights of a checkpoint are exported: trained or averaged.

    Args:
        path: the checkpoint, for the message.
        index: its tensors.
        asked: which the user wants; None: the averaged ones if it has some.

    Raises:
        CheckpointError: they are to be averaged, and it has no averages.
    """
    is_averaged = has_averages(index)
    if asked == "averaged" and not is_averaged:
        raise CheckpointError(
            f"{path} has no averaged weights to export. {WHERE_AVERAGES_ARE}; export the trained ones with --weights "
            "trained"
        )
    return asked or ("averaged" if is_averaged else "trained")


def start_files(where: str | Path, index: TensorIndex, weights: str) -> frozenset[str]:
    """The tensor files that a start reads, by their paths in the checkpoint; otherwise as `start_prefix`."""
    return frozenset(f"{TENSORS_DIR}/{file.name}" for file in index.files_of(start_prefix(where, index, weights)))


def first_rows(value: ShardedValue, num_rows: int) -> ShardedValue:
    """The part of a value that is in the first rows of its tensor; its pieces are views."""
    kept = Box.of_rows(0, num_rows, value.global_shape)
    pieces = []
    for piece in value.pieces:
        box = Box.of_piece(piece)
        common = box.intersect(kept)
        if common is not None:
            pieces.append(Piece(common.offsets, piece.tensor[common.slices_in(box)]))
    return ShardedValue((num_rows, *value.global_shape[1:]), value.dtype, tuple(pieces))


def fill_rows(value: ShardedValue, first_row: int, rows: torch.Tensor) -> None:
    """Writes rows first_row.. of a tensor, [N, D], into the parts of them that a value holds, in its dtype."""
    filled = Box.of_rows(first_row, len(rows), tuple(rows.shape))
    for piece in value.pieces:
        box = Box.of_piece(piece)
        common = box.intersect(filled)
        if common is not None:
            piece.tensor[common.slices_in(box)] = rows[common.slices_in(filled)].to(value.dtype)


def _known_rows(
    name: str, value: ShardedValue | ConsumedValue, new_queries: NewQueries | None
) -> ShardedValue | ConsumedValue:
    """The part of a value that the checkpoint has."""
    if new_queries is None or name not in (EMBEDDING, OUTPUT):
        return value
    assert isinstance(value, ShardedValue), "tables of the vocabulary are held"
    return first_rows(value, new_queries.num_old_rows)


def _fill_new_rows(
    stored: StoredTensors,
    prefix: str,
    groups: Sequence[Mapping[str, ShardedValue | ConsumedValue]],
    new_queries: NewQueries,
) -> None:
    num_old = new_queries.num_old_rows
    for name in (EMBEDDING, OUTPUT):
        if prefix + name in stored:
            trained = stored.read_rows(prefix + name, num_old - new_queries.num_trained, num_old)
            rows = new_queries.rows(name, trained)
            for values in groups:
                held = values.get(name)
                if isinstance(held, ShardedValue):
                    fill_rows(held, num_old, rows)


def _find(where: Path) -> Path | None:
    """The path itself if it is a checkpoint; None if it is a folder of checkpoints."""
    if (where / MANIFEST_NAME).is_file():
        return where
    if _checkpoints(where).is_dir():
        return None
    fix = _way_out(where) or "name a run folder, an imported release or one checkpoint of them (checkpoints/step_...)"
    raise CheckpointError(f"{where}: no checkpoint is there; {fix}")


def _way_out(where: Path) -> str | None:
    """What to do with a path that is another thing than a checkpoint or a folder of them; None: nothing known."""
    if (where / MODEL_CONFIG_NAME).is_file() or (where / INDEX_NAME).is_file():
        return f"it is a Hugging Face folder: import it first with `bitdance import {where} OUT`"
    if (where / SIZES_NAME).is_file():
        return f"it is an export: import its {PICKLE_NAME} first with `bitdance import {where / PICKLE_NAME} OUT`"
    if where.suffix in PICKLED_SUFFIXES and where.is_file():
        return f"it is a published file: import it first with `bitdance import {where} OUT`"
    if (where / CONFIG_NAME).is_file() and step_of(where.name) is None:
        return f"it is a run that has saved none yet; {_WAIT}"
    return None


def _checkpoints(where: Path) -> Path:
    return where if (where / LATEST_NAME).is_file() else where / CHECKPOINTS_DIR


def _latest(where: Path, group: dist.ProcessGroup | None) -> Path:
    root = on_first_rank(lambda: _checkpoints(where), group, other=CheckpointError)
    latest = CheckpointFolder(root, keep=1, group=group).latest()
    if latest is None:
        raise CheckpointError(f"{root}: no checkpoint was committed there yet; {_WAIT}")
    return latest
