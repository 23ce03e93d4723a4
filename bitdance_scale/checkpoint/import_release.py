"""Released weights as a checkpoint for any layout: a BitDance release, or a plain Qwen3 to start from.

Tensors are copied some rows at a time, by the table in `model/published_names.py`, so that no tensor is ever whole
in memory. The outcome is a run folder at step 0:

    config.toml                    the sections of the network, and run.start_from
    checkpoints/step_00000000/     the weights, and averages if there are any beside them, in the dtypes of the source
    tokenizer/                     the text tokenizer with its resolution and query tokens, if it has one
    ae.safetensors, ae_config.json
    conversion_report.json         written last
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import bitdance_scale
from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.conversion_folder import (
    OnBytes,
    check_destination,
    conversion_folder,
    write_conversion_report,
)
from bitdance_scale.checkpoint.integrity import file_digest, tensor_bytes, text_digest
from bitdance_scale.checkpoint.published_files import row_chunks
from bitdance_scale.checkpoint.release_source import Source, Tensors
from bitdance_scale.checkpoint.run_checkpoint import (
    AVERAGE_PREFIX,
    CONFIG_NAME,
    MODEL_PREFIX,
    OPTIMIZER_PREFIX,
    TENSORS_DIR,
    TrainState,
    save_checkpoint,
)
from bitdance_scale.checkpoint.sharded import StreamedValue
from bitdance_scale.checkpoint.start_weights import around_mean
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.initial import draw_initial, named_generator
from bitdance_scale.model.published_names import (
    EMBEDDING,
    OUTPUT,
    NamedTensor,
    Part,
    PublishedTensor,
    published_tensors,
)
from bitdance_scale.sequence.tokenizer_files import write_tokenizer
from bitdance_scale.sequence.tokens import TextTokenizer
from bitdance_scale.vision.tokenizer import vision_digest
from bitdance_scale.vision.weights import WEIGHTS_NAME as AE_WEIGHTS_NAME
from bitdance_scale.weight_files import TensorSpec, dtype_name

TOKENIZER_DIR = "tokenizer"


def import_release(source: Source, out: Path, *, is_forced: bool = False, on_bytes: OnBytes = lambda _: None) -> None:
    """Makes a run folder at step 0 from a source, and reads it back to see that it holds the source's values.

    Args:
        source: from `open_source` or `open_class_source`.
        out: the folder to make.
        is_forced: whether an earlier conversion there is replaced.
        on_bytes: called as bytes are written and read back; initial values are only written.

    Raises:
        CheckpointError: it cannot be written; nothing is left then, and an earlier `out` is as it was.
    """
    check_destination(out, is_forced=is_forced, num_bytes=source.num_bytes + source.autoencoder.num_bytes)
    config_text = dump_toml(_StartConfig(_StartSection(str(out)), **vars(_network_at(out, source))))
    with conversion_folder(out) as folder:
        if isinstance(source.condition, TextTokenizer):
            (folder / TOKENIZER_DIR).mkdir()
            write_tokenizer(source.network.text, source.condition, folder / TOKENIZER_DIR)
        source.autoencoder.write(folder)
        write_text(folder / CONFIG_NAME, config_text)
        checkpoints = CheckpointFolder(folder / CHECKPOINTS_DIR, keep=1)
        weights, averages = (_values(source, parts, on_bytes) for parts in (source.parts, source.averages))
        save_checkpoint(
            checkpoints,
            _state(source, folder),
            weights,
            {AVERAGE_PREFIX.removeprefix(OPTIMIZER_PREFIX) + name: value for name, value in averages.items()},
            config_text,
        )
        latest = checkpoints.latest()
        assert latest is not None
        stored = StoredTensors(latest / TENSORS_DIR)
        digests = _compare(source, source.parts, stored, MODEL_PREFIX, on_bytes)
        average_digests = _compare(source, source.averages, stored, AVERAGE_PREFIX, on_bytes)
        write_conversion_report(
            folder,
            {
                "source": str(source.path),
                "kind": source.kind,
                "config_sha256": text_digest(config_text),
                "autoencoder_sha256": file_digest(folder / AE_WEIGHTS_NAME),
                "notes": list(source.notes),
                "new_embedding_rows": source.num_new_rows,
                "seed": source.new_parts.seed if source.new_parts else None,
                "version": bitdance_scale.__version__,
                "reloaded": "every tensor of the source, byte for byte",
                "tensor_sha256": digests,
                "average_sha256": average_digests,
            },
        )


def _network_at(out: Path, source: Source) -> NetworkConfig:
    """The network with the paths of the folder that is made."""
    network = source.network
    text = dataclasses.replace(network.text, path=str(out / TOKENIZER_DIR)) if network.model.parts.has_text else None
    return dataclasses.replace(
        network,
        vision=dataclasses.replace(network.vision, weights=str(out / AE_WEIGHTS_NAME)),
        text=text or network.text,
    )


def _state(source: Source, folder: Path) -> TrainState:
    """The state of a run at step 0, with what an export writes back."""
    dtypes, average_dtypes = (
        {part.value: dtype_name(tensors.dtype) for part, tensors in parts.items()}
        for parts in (source.parts, source.averages)
    )
    vision = dataclasses.replace(source.network.vision, weights=str(folder / AE_WEIGHTS_NAME))
    return TrainState(
        step=0,
        images=0,
        tokens=0,
        loader={},
        optimizer={"step": 0, "skipped_steps": 0},
        tokenizer_digest=source.condition.digest,
        release=source.inert | {"kind": source.kind, "dtypes": dtypes, "average_dtypes": average_dtypes},
        vision_digest=vision_digest(vision),
    )


@dataclass(frozen=True)
class _StartSection:
    start_from: str


@dataclass(frozen=True)
class _StartConfig:
    """A configuration that a run which starts from the folder can extend."""

    run: _StartSection
    model: object
    head: object
    vision: object
    text: object
    classes: object


def _values(source: Source, parts: Mapping[Part, Tensors], on_bytes: OnBytes) -> dict[str, StreamedValue]:
    """Our tensors from these parts of the source, by name; none if there are no parts."""
    if not parts:
        return {}
    return {tensor.name: _streamed(source, parts, tensor, spec, on_bytes) for tensor, spec in source.tensors(parts)}


def _streamed(
    source: Source, parts: Mapping[Part, Tensors], tensor: NamedTensor, spec: TensorSpec, on_bytes: OnBytes
) -> StreamedValue:
    """A tensor of ours that is read from the source, or drawn, while it is written."""
    shape = tensor.shape
    read: Callable[[int, int], torch.Tensor]
    if tensor.part not in parts:
        draw = functools.lru_cache(maxsize=1)(lambda: _draw(source, tensor))
        boxes, read = [Box.of_rows(0, shape[0], shape)], lambda start, stop: draw()[start:stop]
    elif source.num_new_rows and tensor.name in (EMBEDDING, OUTPUT):
        new_rows = functools.lru_cache(maxsize=1)(lambda: _new_rows(source, tensor, spec.dtype))
        num_old = source.num_old_rows
        published = tensor.rows[0].published
        boxes = [Box.of_rows(0, num_old, shape), Box.of_rows(num_old, shape[0] - num_old, shape)]

        def read(start: int, stop: int) -> torch.Tensor:
            if start >= num_old:
                return new_rows()[start - num_old : stop - num_old]
            return parts[tensor.part].read_rows(published, start, stop)
    else:
        boxes = [Box.of_rows(shared.start, shared.num_rows, shape) for shared in tensor.rows]

        def read(start: int, stop: int) -> torch.Tensor:
            shared = next(s for s in tensor.rows if s.start <= start < s.start + s.num_rows)
            first = shared.published_start + start - shared.start
            return parts[tensor.part].read_rows(shared.published, first, first + stop - start)

    def read_box(box: Box) -> torch.Tensor:
        assert box.sizes[1:] == shape[1:], f"{tensor.name}: a row does not fit a file"
        values = read(box.offsets[0], box.offsets[0] + box.sizes[0])
        on_bytes(values.nbytes)
        return values

    return StreamedValue(shape, spec.dtype, tuple(boxes), read_box)


def _draw(source: Source, tensor: NamedTensor) -> torch.Tensor:
    """Initial values of the head or the projector, those of a run with this seed."""
    assert source.new_parts is not None
    return draw_initial(tensor.name, tensor.shape, source.new_parts.seed, source.network.model.init_std, "cpu")


def _new_rows(source: Source, tensor: NamedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the added tokens: the mean of the old rows and normal noise of `NEW_ROW_SPREAD` times their spread.

    Mean and spread are per channel. A Qwen3 has rows beyond its tokenizer's entries. They were never trained: they do
    not count, and the new rows take their place.
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


def _compare(
    source: Source, parts: Mapping[Part, Tensors], stored: StoredTensors, prefix: str, on_bytes: OnBytes
) -> dict[str, str]:
    """Compares what was written with the source; returns published name -> SHA-256 of the rows that were kept."""
    digests = {}
    for tensor in published_tensors(source.network, source.condition.vocab_size):
        if tensor.part not in parts:
            continue
        digest = hashlib.sha256()
        for ours, start, theirs, num_rows in _kept_rows(source, tensor):
            found = stored.read_rows(prefix + ours, start, start + num_rows)
            wanted = parts[tensor.part].read_rows(tensor.name, theirs, theirs + num_rows)
            if not torch.equal(_as_bytes(found), _as_bytes(wanted)):
                raise CheckpointError(
                    f"{tensor.name}: reads back with other values than {source.path} holds; the disk or the memory "
                    "of this machine is faulty: convert on another machine"
                )
            digest.update(tensor_bytes(wanted))
            on_bytes(wanted.nbytes)
        digests[tensor.name] = digest.hexdigest()
    return digests


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """For comparing bits: a NaN is not equal to itself."""
    return values.contiguous().view(-1).view(torch.uint8)


def _kept_rows(source: Source, tensor: PublishedTensor) -> Iterator[tuple[str, int, int, int]]:
    """Chunks of the rows that are kept: (our name, first row in ours, first row in the published tensor, num_rows)."""
    # A dtype is at most four bytes wide.
    row_bytes = tensor.row_size * 4
    for ours, shared in tensor.rows:
        num_rows = min(shared.num_rows, source.num_old_rows) if ours in (EMBEDDING, OUTPUT) else shared.num_rows
        for start, stop in row_chunks(num_rows, row_bytes):
            yield ours, shared.start + start, shared.published_start + start, stop - start
