"""A published class-conditional network to import, such as `BitDance_B_4x.pt`, checked before anything is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from bitdance_scale.checkpoint.autoencoder_source import (
    AutoencoderSource,
    open_autoencoder,
    pickled_autoencoder,
)
from bitdance_scale.checkpoint.integrity import tensor_bytes
from bitdance_scale.checkpoint.pickled_files import AVERAGED_ENTRY, TRAINED_ENTRY, PickledFile, PickledTensors
from bitdance_scale.checkpoint.release_source import Source
from bitdance_scale.config.load import load_network
from bitdance_scale.config.published_class import deduced_network, described, read_class_config
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.model.published_names import PUBLISHED_QUERIES, Part, PublishedTensor, published_tensors
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.weight_files import read_json
from bitdance_scale.wording import first_few

ENTRIES: Mapping[str, str] = {"trained": TRAINED_ENTRY, "averaged": AVERAGED_ENTRY}
"""Kind of weights -> the dictionary of a published file that has them."""
VAE_PREFIX = "vae."
_PREFIXES = {Part.HEAD: "head.", Part.PROJECTOR: "proj_in."}


def open_class_source(
    file: PickledFile, *, weights: str | None = None, config: Path | None = None, autoencoder: Path | None = None
) -> Source:
    """Checks a published class-conditional file; values are read only to compare two copies of an autoencoder.

    Args:
        file: the file.
        weights: trained or averaged, where only these are wanted; None: all that it has.
        config: configuration that says what its sizes are; None: the JSON of an export beside it, or its shapes.
        autoencoder: weights of the autoencoder, for a file without its own.

    Raises:
        BitDanceError: it holds other things than such a network, or its tensors do not fit each other or
            the configuration.
    """
    path = file.path
    entries = _chosen_entries(file, weights)
    has_vae = [entry for entry in entries if any(name.startswith(VAE_PREFIX) for name in file.entries[entry])]
    vae = _autoencoder(file, has_vae, autoencoder)
    beside = path.with_name(path.stem + "_config.json")
    network = _network(file, entries[0], config, beside, vae)
    condition = load_condition(network)
    wanted = {tensor.name: tensor for tensor in published_tensors(network, condition.vocab_size)}
    groups = []
    query_shapes: dict[str, object] = {}
    for entry in entries:
        query_shapes[entry] = _take_queries(file, entry, wanted)
        groups.append(_parts(file, entry, network, wanted, is_stated=config is not None or beside.is_file()))
    ignored = [*file.ignored, *(name for name in file.entries if name not in entries)]
    notes = [f"{path}: not read: {first_few(ignored)}"] if ignored else []
    notes.append(f"{path}: {' and '.join(entries)} of a network of {described(network)}")
    return Source(
        path=path,
        network=network,
        condition=condition,
        parts=groups[0],
        autoencoder=vae,
        new_parts=None,
        inert={"entries": list(entries), "query_shapes": query_shapes, "with_autoencoder": has_vae},
        notes=tuple(notes),
        averages=groups[1] if len(groups) > 1 else {},
    )


def _chosen_entries(file: PickledFile, weights: str | None) -> tuple[str, ...]:
    """The dictionaries to read: the trained weights first, if both are there."""
    found = [entry for entry in ENTRIES.values() if entry in file.entries]
    if not found:
        raise CheckpointError(
            f"{file.path}: holds {first_few([*file.entries, *file.ignored]) or 'nothing'}, expected `model` or `ema`, "
            "dictionaries of tensors; name a published class-conditional file, or save its weights again under one of "
            "these names"
        )
    if weights is None:
        return tuple(found)
    entry = ENTRIES[weights]
    if entry not in found:
        raise CheckpointError(
            f"{file.path}: --weights {weights}: has no `{entry}`, only {', '.join(found)}; leave --weights out"
        )
    return (entry,)


def _autoencoder(file: PickledFile, has_vae: list[str], given: Path | None) -> AutoencoderSource:
    if has_vae and given is not None:
        raise CheckpointError(
            f"{file.path}: has its autoencoder ({VAE_PREFIX}* of {' and '.join(has_vae)}); leave --autoencoder out"
        )
    if not has_vae:
        if given is None:
            raise CheckpointError(
                f"{file.path}: has no autoencoder ({VAE_PREFIX}*); name its weights with --autoencoder, such as "
                "ae_d16c32.pt"
            )
        return open_autoencoder(given)
    copies = [PickledTensors(file, entry, prefix=VAE_PREFIX) for entry in has_vae]
    if len(copies) > 1 and not _are_equal(*copies):
        raise CheckpointError(
            f"{file.path}: model and ema hold different autoencoders ({VAE_PREFIX}*), and a run has one; choose one "
            "with --weights trained or --weights averaged"
        )
    return pickled_autoencoder(copies[0])


def _are_equal(one: PickledTensors, other: PickledTensors) -> bool:
    """Whether two autoencoders have the same values; one tensor of each is read at a time."""
    return one.found == other.found and all(
        tensor_bytes(one.read_rows(name, 0, spec.shape[0])) == tensor_bytes(other.read_rows(name, 0, spec.shape[0]))
        for name, spec in one.found.items()
    )


def _network(file: PickledFile, entry: str, config: Path | None, beside: Path, vae: AutoencoderSource) -> NetworkConfig:
    """The network of a file, with the sizes of its autoencoder."""
    if config is not None:
        network = load_network(config)
        if network.model.parts.has_text:
            raise ConfigError(f"{config}: model.family = {network.model.family!r}: must be 'class_conditional'")
    elif beside.is_file():
        network = read_class_config(read_json(beside), str(beside))
    else:
        shapes = {name: spec.shape for name, spec in file.entries[entry].items()}
        network = deduced_network(shapes, f"{file.path}, `{entry}`")
    num_bits = vae.sizes["num_bits"]
    if network.vision.num_bits != num_bits:
        raise CheckpointError(
            f"{file.path}: the network reads {network.vision.num_bits} bits per token (proj_in.w1.weight) and its "
            f"autoencoder writes {num_bits}; name the autoencoder that it was trained with"
        )
    return dataclasses.replace(network, vision=dataclasses.replace(network.vision, **vae.sizes))


def _take_queries(file: PickledFile, entry: str, wanted: Mapping[str, PublishedTensor]) -> list[int] | None:
    """The shape of `query_token`, for an export to write it back; an empty one is taken out of what is to be read.

    Some files have no leading dimension of 1, and with blocks of one token it is empty or missing.
    """
    found = file.entries[entry]
    if PUBLISHED_QUERIES not in found:
        return None
    shape = found[PUBLISHED_QUERIES].shape
    if PUBLISHED_QUERIES not in wanted and 0 in shape:
        del found[PUBLISHED_QUERIES]
    return list(shape)


def _parts(
    file: PickledFile, entry: str, network: NetworkConfig, wanted: Mapping[str, PublishedTensor], *, is_stated: bool
) -> dict[Part, PickledTensors]:
    """The parts of a network in a dictionary, checked."""
    fix = "Fetch the file again"
    if is_stated:
        fix = f"Its sizes must be those of the file{_own_sizes(file, entry)}"
    parts = {part: PickledTensors(file, entry, part, functools.partial(_is_of, part)) for part in Part}
    for part, tensors in parts.items():
        of_part = {name: tensor for name, tensor in wanted.items() if tensor.part is part}
        if part is Part.BACKBONE and PUBLISHED_QUERIES in of_part:
            queries, found = of_part[PUBLISHED_QUERIES], tensors.found.get(PUBLISHED_QUERIES)
            if found is not None and found.shape == queries.shape[1:]:
                of_part[PUBLISHED_QUERIES] = dataclasses.replace(queries, shape=found.shape)
        tensors.check(of_part, fix)
    return parts


def _is_of(part: Part, name: str) -> bool:
    prefix = _PREFIXES.get(part)
    return name.startswith(prefix) if prefix else not name.startswith((VAE_PREFIX, *_PREFIXES.values()))


def _own_sizes(file: PickledFile, entry: str) -> str:
    """The sizes that the shapes of a file say, for a message; empty where they say none."""
    shapes = {name: spec.shape for name, spec in file.entries[entry].items()}
    try:
        return ": " + described(deduced_network(shapes, str(file.path)))
    except CheckpointError:
        return ""
