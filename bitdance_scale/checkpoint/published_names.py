"""The table of names: which rows of our tensors are which rows of the published tensors.

One of our tensors may stack several published ones in blocks of rows. Qwen3 keeps query, key and value in three
matrices; a layer's `linear_qkv` has, for each key/value head, the rows of its query heads, then those of the key, then
those of the value. `linear_fc1` has the gate projection above the up projection. No value is changed and no row is cut,
so a conversion is a copy in either direction. Head and projector have the published names and shapes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bitdance_scale.config.schema import ModelSection, NetworkConfig
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector

EMBEDDING = "embedding.weight"
OUTPUT = "output.weight"
PUBLISHED_EMBEDDING = "model.embed_tokens.weight"
PUBLISHED_OUTPUT = "lm_head.weight"


class Part(enum.StrEnum):
    """A part of a published folder with weights; each part has its own files."""

    BACKBONE = "backbone"
    HEAD = "head"
    PROJECTOR = "projector"


@dataclass(frozen=True)
class SharedRows:
    """Consecutive rows that one of our tensors and a published tensor share.

    Attributes:
        start: the first row in ours.
        published: name of the published tensor.
        published_start: the first row in the published tensor.
        num_rows: how many rows.
    """

    start: int
    published: str
    published_start: int
    num_rows: int


@dataclass(frozen=True)
class NamedTensor:
    """One of our tensors.

    Attributes:
        name: global name.
        shape: whole shape, without padding.
        part: part of the published folder that has its rows.
        rows: blocks of rows (elements of a vector) that make it up, in its order.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    rows: tuple[SharedRows, ...]


@dataclass(frozen=True)
class PublishedTensor:
    """One published tensor.

    Attributes:
        name: its name in the files of its part.
        shape: its shape.
        part: the part it is in.
        rows: (name of our tensor, block of rows) that make it up, in its order.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    rows: tuple[tuple[str, SharedRows], ...]


def our_tensors(network: NetworkConfig, vocab_size: int) -> Iterator[NamedTensor]:
    """Every parameter of a network, in the order in which a sample passes through it.

    Args:
        network: its sizes.
        vocab_size: rows of the embedding, without padding.
    """
    model = network.model
    hidden = model.hidden_size
    yield _same(EMBEDDING, PUBLISHED_EMBEDDING, (vocab_size, hidden), Part.BACKBONE)
    with torch.device("meta"):
        projector, head = _projector(network), _head(network)
    yield from _part_tensors(projector, "projector", Part.PROJECTOR)
    for index in range(model.num_layers):
        yield from _layer(model, index)
    yield _same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,), Part.BACKBONE)
    if not model.tie_embeddings:
        yield _same(OUTPUT, PUBLISHED_OUTPUT, (vocab_size, hidden), Part.BACKBONE)
    yield from _part_tensors(head, "head", Part.HEAD)


def published_tensors(network: NetworkConfig, vocab_size: int) -> list[PublishedTensor]:
    """Every tensor of the published files, in the order of ours."""
    rows: dict[tuple[Part, str], list[tuple[str, SharedRows]]] = {}
    trailing: dict[tuple[Part, str], tuple[int, ...]] = {}
    for tensor in our_tensors(network, vocab_size):
        for shared in tensor.rows:
            rows.setdefault((tensor.part, shared.published), []).append((tensor.name, shared))
            trailing[tensor.part, shared.published] = tensor.shape[1:]
    return [
        PublishedTensor(
            name,
            (sum(shared.num_rows for _, shared in blocks), *trailing[part, name]),
            part,
            tuple(sorted(blocks, key=lambda block: block[1].published_start)),
        )
        for (part, name), blocks in rows.items()
    ]


def _same(name: str, published: str, shape: tuple[int, ...], part: Part) -> NamedTensor:
    return NamedTensor(name, shape, part, (SharedRows(0, published, 0, shape[0]),))


def _stacked(name: str, columns: int, blocks: list[tuple[str, int, int]]) -> NamedTensor:
    """A backbone matrix that stacks blocks of (published name, first row there, number of rows)."""
    rows, start = [], 0
    for published, published_start, num_rows in blocks:
        rows.append(SharedRows(start, published, published_start, num_rows))
        start += num_rows
    return NamedTensor(name, (start, columns), Part.BACKBONE, tuple(rows))


def _layer(model: ModelSection, index: int) -> Iterator[NamedTensor]:
    ours, theirs, hidden = f"decoder.layers.{index}.", f"model.layers.{index}.", model.hidden_size
    head_dim, group = model.head_dim, model.num_heads // model.num_kv_heads * model.head_dim
    attention = theirs + "self_attn."
    qkv = [
        block
        for kv_head in range(model.num_kv_heads)
        for block in (
            (attention + "q_proj.weight", kv_head * group, group),
            (attention + "k_proj.weight", kv_head * head_dim, head_dim),
            (attention + "v_proj.weight", kv_head * head_dim, head_dim),
        )
    ]
    gate_up = [(theirs + f"mlp.{name}_proj.weight", 0, model.ffn_size) for name in ("gate", "up")]

    def vector(name: str, published: str, size: int) -> NamedTensor:
        return _same(ours + name + ".weight", theirs + published + ".weight", (size,), Part.BACKBONE)

    yield vector("input_layernorm", "input_layernorm", hidden)
    yield _stacked(ours + "self_attention.linear_qkv.weight", hidden, qkv)
    yield vector("self_attention.q_layernorm", "self_attn.q_norm", head_dim)
    yield vector("self_attention.k_layernorm", "self_attn.k_norm", head_dim)
    attended = (hidden, model.num_heads * head_dim)
    yield _same(ours + "self_attention.linear_proj.weight", attention + "o_proj.weight", attended, Part.BACKBONE)
    yield vector("pre_mlp_layernorm", "post_attention_layernorm", hidden)
    yield _stacked(ours + "mlp.linear_fc1.weight", hidden, gate_up)
    down = (hidden, model.ffn_size)
    yield _same(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", down, Part.BACKBONE)


def _projector(network: NetworkConfig) -> torch.nn.Module:
    return Projector(network.vision.num_bits, network.model.hidden_size, PlainLinears())


def _head(network: NetworkConfig) -> torch.nn.Module:
    hidden, vision = network.model.hidden_size, network.vision
    return DiffusionHead(network.head, hidden, vision.num_bits, vision.block_tokens, PlainLinears())


def _part_tensors(module: torch.nn.Module, prefix: str, part: Part) -> Iterator[NamedTensor]:
    for name, parameter in module.named_parameters():
        yield _same(f"{prefix}.{name}", name, tuple(parameter.shape), part)
