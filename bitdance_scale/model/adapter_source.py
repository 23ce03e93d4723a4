"""Trained adapters that are not part of a run: where their matrices are, and whether they fit a network.

They come from an adapter folder (`adapter_folder.py`) or from a checkpoint (`checkpoint/run_adapters.py`).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model.adaptable import AdaptableLinear, linears_of
from bitdance_scale.model.published_names import Part, our_tensors, published_tensors
from bitdance_scale.wording import first_few

_NUM_MARKED_ROWS = 8


@dataclass(frozen=True)
class Matrices:
    """The adapter of one published linear.

    Attributes:
        rank: rows of A, columns of B.
        out_size, in_size: features of the linear.
        scale: what the product is multiplied by.
    """

    rank: int
    out_size: int
    in_size: int
    scale: float


@dataclass(frozen=True)
class BaseFacts:
    """What adapters were trained beside.

    Attributes:
        name: what its run called it.
        sizes: name of a setting -> value, of all that decides the shapes and the meaning of the weights.
        fingerprint: from `fingerprint`.
    """

    name: str
    sizes: Mapping[str, Any]
    fingerprint: Mapping[str, str]


@dataclass(frozen=True)
class AdapterSource:
    """Trained adapters, whose tensors are read when they are asked for.

    Attributes:
        where: folder or checkpoint, for messages.
        matrices: name of a linear (`AdaptableLinear.name`) -> its adapter.
        projector: published name -> shape, of a projector that was trained as a whole; empty: it was not.
        num_queries: query tokens whose embeddings are changed; 0: none.
        base: what they were trained beside; None: not known, as for what PEFT writes.
        read_a, read_b: linear -> [rank, in]; linear, first and last row + 1 -> rows of [out, rank].
        read_projector: published name -> the tensor.
        read_queries: [num_queries, D].
    """

    where: str
    matrices: Mapping[str, Matrices]
    projector: Mapping[str, tuple[int, ...]]
    num_queries: int
    base: BaseFacts | None
    read_a: Callable[[str], torch.Tensor]
    read_b: Callable[[str, int, int], torch.Tensor]
    read_projector: Callable[[str], torch.Tensor]
    read_queries: Callable[[], torch.Tensor]

    def digest(self) -> str:
        """SHA-256 over all that they change a network by; reads all of it."""
        found = hashlib.sha256()

        def add(name: str, values: torch.Tensor) -> None:
            found.update(name.encode())
            found.update(values.float().contiguous().numpy().tobytes())

        for name, matrices in sorted(self.matrices.items()):
            add(f"{name} {matrices.scale}", self.read_a(name))
            add(name, self.read_b(name, 0, matrices.out_size))
        for name in sorted(self.projector):
            add(name, self.read_projector(name))
        if self.num_queries:
            add("queries", self.read_queries())
        return found.hexdigest()


@dataclass(frozen=True)
class WeightedAdapter:
    """Adapters and how much of them acts; 1 is what was trained, 0 is nothing."""

    source: AdapterSource
    weight: float = 1.0


def adaptable_linears(network: NetworkConfig, vocab_size: int) -> dict[str, AdaptableLinear]:
    """Name -> linear, of all that can have an adapter."""
    found = (linear for tensor in our_tensors(network, vocab_size) for linear in linears_of(tensor))
    return {linear.name: linear for linear in found}


def sizes_of(network: NetworkConfig) -> dict[str, Any]:
    """The settings that decide which weights a network has, as `section.name`."""
    names = {
        "model": ("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size"),
        "head": ("width", "num_blocks", "num_adaln", "head_dim"),
        "vision": ("num_bits", "block_side"),
    }
    return {
        f"{section}.{name}": getattr(getattr(network, section), name)
        for section, fields in names.items()
        for name in fields
    }


def fingerprint(
    network: NetworkConfig, vocab_size: int, read_rows: Callable[[Part, str, int], torch.Tensor]
) -> dict[str, str]:
    """Tells the weights of a base from others, reading little of them.

    Args:
        network: its sizes.
        vocab_size: rows of its embedding.
        read_rows: part, published name, number of rows -> the first rows of a tensor, any dtype.

    Returns:
        Name of each linear that can have an adapter -> SHA-256 of its first 8 rows, rounded to bfloat16, so that the
        same weights have the same in float32 as in bfloat16. Training changes every row.
    """
    digests = {}
    for name, linear in adaptable_linears(network, vocab_size).items():
        rows = read_rows(linear.part, linear.published, min(_NUM_MARKED_ROWS, linear.out_size))
        content = rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def check_fits(source: AdapterSource, network: NetworkConfig, vocab_size: int, where: str) -> None:
    """Compares adapters with the network that they are to change, by names and sizes; reads no tensor.

    Args:
        source: the adapters.
        network: the network.
        vocab_size: rows of its embedding.
        where: what it is called in messages.

    Raises:
        CheckpointError: they are of a network of other sizes, or of linears that it lacks.
    """
    if source.base is not None:
        sizes = sizes_of(network)
        others = [
            f"{name} is {source.base.sizes.get(name)!r} of their base, {value!r} of {where}"
            for name, value in sizes.items()
            if source.base.sizes.get(name) != value
        ]
        if others:
            raise CheckpointError(
                f"{source.where}: adapters of another network than {where}: {first_few(others)}. Their base is "
                f"{source.base.name}; name it, or adapters of this network"
            )
    linears = adaptable_linears(network, vocab_size)
    unknown = [name for name in source.matrices if name not in linears]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(linears), n=3, cutoff=0.3) or list(linears)[:3]
        raise CheckpointError(
            f"{source.where}: {first_few([f'{name} is no linear of {where}' for name in unknown])}; the nearest are "
            f"{', '.join(near)}. Name adapters of this network"
        )
    problems = [
        f"{name} is [{found.out_size}, {found.in_size}] there, [{linears[name].out_size}, {linears[name].in_size}] in "
        f"{where}"
        for name, found in source.matrices.items()
        if (found.out_size, found.in_size) != (linears[name].out_size, linears[name].in_size)
    ]
    problems += _beside_linears(source, network, vocab_size, where)
    if problems:
        raise CheckpointError(
            f"{source.where}: adapters of a network of other sizes: {first_few(problems)}. Name adapters of this "
            "network"
        )


def check_base(source: AdapterSource, found: Mapping[str, str], where: str) -> None:
    """Compares the weights that adapters were trained beside with those that they are to change.

    Args:
        source: the adapters.
        found: `fingerprint` of the network.
        where: what it is called in messages.

    Raises:
        CheckpointError: they are others.
    """
    if source.base is None:
        return
    others = [name for name, digest in found.items() if source.base.fingerprint.get(name) != digest]
    if others:
        raise CheckpointError(
            f"{source.where}: trained beside other weights than those of {where}: {len(others)} of {len(found)} "
            f"linears differ, such as {others[0]}. Their base is {source.base.name}; name it, or train adapters on "
            "these weights"
        )


def _beside_linears(source: AdapterSource, network: NetworkConfig, vocab_size: int, where: str) -> list[str]:
    """What does not fit of projector and query tokens."""
    problems = []
    if source.projector:
        wanted = {
            tensor.name: tensor.shape
            for tensor in published_tensors(network, vocab_size)
            if tensor.part is Part.PROJECTOR
        }
        problems = [
            f"{name} of the projector is {list(source.projector.get(name, ()))} there, {list(shape)} in {where}"
            for name, shape in wanted.items()
            if source.projector.get(name) != shape
        ]
    num_queries = network.vision.block_tokens - 1
    if source.num_queries not in (0, num_queries):
        problems.append(f"it has {source.num_queries} query tokens, {where} has {num_queries}")
    return problems


def check_finite(values: torch.Tensor, where: str) -> torch.Tensor:
    """The values as they are.

    Raises:
        CheckpointError: one is not finite.
    """
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{where}: has values that are not finite; export or fetch the adapters again")
    return values
