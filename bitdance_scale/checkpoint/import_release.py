"""A published folder as a checkpoint that any layout loads: a BitDance release, or a plain Qwen3 to start from.

Tensors are copied row block by row block (`checkpoint/published_names.py`), so that no tensor is ever whole in memory. What is made
is a run folder at step 0:

    config.toml                    [model] [head] [vision] [text] of the network, and run.start_from
    checkpoints/step_00000000/     the weights, in the dtypes of the source
    tokenizer/                     the text tokenizer with its resolution and query tokens
    ae.safetensors, ae_config.json
    conversion_report.json         written last
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import bitdance_scale
from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.conversion_folder import Progress, check_outcome, conversion_folder, write_report
from bitdance_scale.checkpoint.digest import file_digest, text_digest
from bitdance_scale.checkpoint.new_rows import around_mean
from bitdance_scale.checkpoint.published_names import (
    EMBEDDING,
    OUTPUT,
    NamedTensor,
    PublishedTensor,
    published_tensors,
)
from bitdance_scale.checkpoint.published_tensors import row_chunks
from bitdance_scale.checkpoint.release_source import Source, autoencoder_config
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, MODEL_PREFIX, TENSORS_DIR, TrainState, save_checkpoint
from bitdance_scale.checkpoint.sharded import StreamedValue
from bitdance_scale.checkpoint.start_weights import CHECKPOINTS_DIR
from bitdance_scale.checkpoint.stored_tensors import StoredTensors
from bitdance_scale.config.load import dump_toml
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.initial import draw_initial, named_generator
from bitdance_scale.sequence.tokenizer_files import write_tokenizer
from bitdance_scale.vision.weights import CONFIG_NAME as AE_CONFIG_NAME
from bitdance_scale.vision.weights import WEIGHTS_NAME as AE_WEIGHTS_NAME
from bitdance_scale.weight_files import TensorSpec

TOKENIZER_DIR = "tokenizer"


def import_release(source: Source, out: Path, *, is_forced: bool = False, progress: Progress = lambda _: None) -> None:
    """Makes a run folder at step 0 of a source, and reads it back to see that it holds the source's values.

    Args:
        source: from `open_source`.
        out: the folder to make.
        is_forced: whether an earlier conversion there is replaced.
        progress: called with bytes done: all are written, and those of the source read back.

    Raises:
        CheckpointError: it cannot be written; nothing is left then, and an earlier `out` is as it was.
    """
    autoencoder = source.network.vision.weights_path
    check_outcome(out, is_forced=is_forced, num_bytes=source.num_bytes + autoencoder.stat().st_size)
    network = dataclasses.replace(
        source.network,
        vision=dataclasses.replace(source.network.vision, weights=str(out / AE_WEIGHTS_NAME)),
        text=dataclasses.replace(source.network.text, path=str(out / TOKENIZER_DIR)),
    )
    config_text = dump_toml(_StartConfig(_StartSection(str(out)), **vars(network)))
    dtypes = {part.value: str(tensors.dtype).removeprefix("torch.") for part, tensors in source.parts.items()}
    state = TrainState(
        step=0,
        images=0,
        tokens=0,
        loader={},
        optimizer={"step": 0, "skipped_steps": 0},
        tokenizer_digest=source.tokenizer.digest,
        release=source.inert | {"kind": source.kind, "dtypes": dtypes},
    )
    with conversion_folder(out) as folder:
        (folder / TOKENIZER_DIR).mkdir()
        write_tokenizer(source.network.text, source.tokenizer, folder / TOKENIZER_DIR)
        shutil.copyfile(autoencoder, folder / AE_WEIGHTS_NAME)
        shutil.copyfile(autoencoder_config(autoencoder), folder / AE_CONFIG_NAME)
        write_text(folder / CONFIG_NAME, config_text)
        checkpoints = CheckpointFolder(folder / CHECKPOINTS_DIR, keep=1)
        values = {tensor.name: _streamed(source, tensor, spec, progress) for tensor, spec in source.tensors()}
        save_checkpoint(checkpoints, state, values, {}, config_text)
        latest = checkpoints.latest()
        assert latest is not None
        digests = _compare(source, StoredTensors(latest / TENSORS_DIR), progress)
        write_report(
            folder,
            {
                "source": str(source.folder),
                "kind": source.kind,
                "config_sha256": text_digest(config_text),
                "autoencoder_sha256": file_digest(folder / AE_WEIGHTS_NAME),
                "new_embedding_rows": source.tokenizer.vocab_size - source.num_old_rows,
                "seed": source.new_parts.seed if source.new_parts else None,
                "version": bitdance_scale.__version__,
                "reloaded": "every tensor of the source, byte for byte",
                "tensor_sha256": digests,
            },
        )


@dataclass(frozen=True)
class _StartSection:
    start_from: str


@dataclass(frozen=True)
class _StartConfig:
    """What a run that starts from the folder can extend."""

    run: _StartSection
    model: object
    head: object
    vision: object
    text: object


def _streamed(source: Source, tensor: NamedTensor, spec: TensorSpec, progress: Progress) -> StreamedValue:
    """A tensor of ours that is read from the source, or drawn, while it is written."""
    trailing = tensor.shape[1:]

    def rows_box(start: int, num_rows: int) -> Box:
        return Box((start, *(0 for _ in trailing)), (num_rows, *trailing))

    if tensor.part not in source.parts:
        draw = functools.lru_cache(maxsize=1)(lambda: _draw(source, tensor))
        boxes, read = [rows_box(0, tensor.shape[0])], lambda start, stop: draw()[start:stop]
    elif tensor.name in (EMBEDDING, OUTPUT):
        new_rows = functools.lru_cache(maxsize=1)(lambda: _new_rows(source, tensor, spec.dtype))
        num_old = source.num_old_rows
        published = tensor.rows[0].published
        boxes = [rows_box(0, num_old)]
        if num_old < tensor.shape[0]:
            boxes.append(rows_box(num_old, tensor.shape[0] - num_old))

        def read(start: int, stop: int) -> torch.Tensor:
            if start >= num_old:
                return new_rows()[start - num_old : stop - num_old]
            return source.parts[tensor.part].read_rows(published, start, stop)
    else:
        boxes = [rows_box(shared.start, shared.num_rows) for shared in tensor.rows]

        def read(start: int, stop: int) -> torch.Tensor:
            shared = next(s for s in tensor.rows if s.start <= start < s.start + s.num_rows)
            first = shared.published_start + start - shared.start
            return source.parts[tensor.part].read_rows(shared.published, first, first + stop - start)

    def read_box(box: Box) -> torch.Tensor:
        assert box.sizes[1:] == trailing, f"{tensor.name}: a row does not fit a file"
        values = read(box.offsets[0], box.offsets[0] + box.sizes[0])
        progress(values.nbytes)
        return values

    return StreamedValue(tensor.shape, spec.dtype, tuple(boxes), read_box)


def _draw(source: Source, tensor: NamedTensor) -> torch.Tensor:
    """Initial values of the head or the projector, those of a run with this seed."""
    assert source.new_parts is not None
    return draw_initial(tensor.name, tensor.shape, source.new_parts.seed, source.network.model.init_std, "cpu")


def _new_rows(source: Source, tensor: NamedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the added tokens: the mean of the old rows, and normal noise of a tenth of their spread.

    Mean and spread are per channel. The rows that a Qwen3 holds beyond its tokenizer's entries were never trained and
    do not count; the new rows take their place.
    """
    assert source.new_parts is not None
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start, stop in row_chunks(source.num_old_rows, tensor.shape[1] * 8):
        rows = source.parts[tensor.part].read_rows(tensor.rows[0].published, start, stop).double()
        total += rows.sum(dim=0)
        squares += rows.square().sum(dim=0)
    mean = total / source.num_old_rows
    spread = (squares / source.num_old_rows - mean.square()).clamp_min(0).sqrt()
    num_new = tensor.shape[0] - source.num_old_rows
    generator = named_generator(source.new_parts.seed, tensor.name, "cpu")
    noise = torch.randn(num_new, tensor.shape[1], dtype=torch.float64, generator=generator)
    return around_mean(mean, spread, noise).to(dtype)


def _compare(source: Source, stored: StoredTensors, progress: Progress) -> dict[str, str]:
    """Reads back what was written against the source; SHA-256 by published name, of the rows that are kept."""
    digests = {}
    names = published_tensors(source.network, source.tokenizer.vocab_size)
    for tensor in names:
        if tensor.part not in source.parts:
            continue
        digest = hashlib.sha256()
        for ours, start, theirs, num_rows in _kept_rows(source, tensor):
            found = stored.read_rows(MODEL_PREFIX + ours, start, start + num_rows)
            wanted = source.parts[tensor.part].read_rows(tensor.name, theirs, theirs + num_rows)
            content = wanted.contiguous().view(-1).view(torch.uint8)
            if not torch.equal(found.view(-1).view(torch.uint8), content):
                raise CheckpointError(
                    f"{tensor.name}: was written with other values than {source.folder} holds; the disk or the memory of "
                    "this machine is at fault"
                )
            digest.update(content.numpy())
            progress(content.numel())
        digests[tensor.name] = digest.hexdigest()
    return digests


def _kept_rows(source: Source, tensor: PublishedTensor) -> Iterator[tuple[str, int, int, int]]:
    """(our name, first row there, first row of the published tensor, rows), chunk by chunk, new rows left out."""
    row_bytes = max(1, torch.Size(tensor.shape[1:]).numel()) * source.parts[tensor.part].dtype.itemsize
    for ours, shared in tensor.rows:
        num_rows = min(shared.num_rows, source.num_old_rows) if ours in (EMBEDDING, OUTPUT) else shared.num_rows
        for start, stop in row_chunks(num_rows, row_bytes):
            yield ours, shared.start + start, shared.published_start + start, stop - start
