"""The table of names: which rows of our tensors are which rows of the published tensors.

One of our tensors may stack several published ones in blocks of rows. Qwen3 keeps query, key and value in three
matrices; a layer's `linear_qkv` has, for each key/value head, the rows of its query heads, then those of the key, then
those of the value. `linear_fc1` has the gate projection above the up projection. Class-conditional networks are
published with one matrix of all queries, keys and values, and with the tokens of a class side by side in one row, which
are rows of their own in our embedding; the query tokens follow them there. No value is changed and no row of ours is
cut, so a conversion is a copy in either direction. Head and projector have the published names and shapes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bitdance_scale.config.schema import ModelSection, NetworkConfig
from bitdance_scale.model.heads import make_head
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import PROJECTORS

EMBEDDING = "embedding.weight"
OUTPUT = "output.weight"
PUBLISHED_EMBEDDING = "model.embed_tokens.weight"
PUBLISHED_OUTPUT = "lm_head.weight"
PUBLISHED_CLASSES = "cls_embedding.weight"
PUBLISHED_QUERIES = "query_token"


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
        published_start: the first row in the published tensor, seen as rows of the shape of ours.
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
        row_shape: shape of such a row, in ours.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    rows: tuple[tuple[str, SharedRows], ...]
    row_shape: tuple[int, ...]

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return math.prod(self.row_shape)


def our_tensors(network: NetworkConfig, vocab_size: int) -> Iterator[NamedTensor]:
    """Every parameter of a network, in the order in which a sample passes through it.

    Args:
        network: its sizes.
        vocab_size: rows of the embedding, without padding.
    """
    model, family = network.model, network.model.parts
    names = _QWEN3 if family.has_text else _CLASS_CONDITIONAL
    hidden = model.hidden_size
    yield _embedding(network, vocab_size)
    with torch.device("meta"):
        projector, head = _projector(network), make_head(network, PlainLinears())
    yield from _part_tensors(projector, "projector", names.projector, Part.PROJECTOR)
    if family.has_input_norm:
        yield _same("input_norm.weight", "emb_norm.weight", (hidden,), Part.BACKBONE)
    for index in range(model.num_layers):
        yield from _layer(model, index, names)
    yield _same("decoder.final_layernorm.weight", names.final_norm, (hidden,), Part.BACKBONE)
    if family.has_text and not model.tie_embeddings:
        yield _same(OUTPUT, PUBLISHED_OUTPUT, (vocab_size, hidden), Part.BACKBONE)
    if family.head_cells == "learned":
        yield _same("head_positions.weight", "pos_for_diff.weight", (network.classes.num_cells, hidden), Part.BACKBONE)
    yield from _part_tensors(head, "head", names.head, Part.HEAD)


def published_tensors(network: NetworkConfig, vocab_size: int) -> list[PublishedTensor]:
    """Every tensor of the published files, in the order of ours."""
    rows: dict[tuple[Part, str], list[tuple[str, SharedRows]]] = {}
    trailing: dict[tuple[Part, str], tuple[int, ...]] = {}
    for tensor in our_tensors(network, vocab_size):
        for shared in tensor.rows:
            rows.setdefault((tensor.part, shared.published), []).append((tensor.name, shared))
            trailing[tensor.part, shared.published] = tensor.shape[1:]
    tensors = []
    for (part, name), blocks in rows.items():
        blocks.sort(key=lambda block: block[1].published_start)
        shape = (sum(shared.num_rows for _, shared in blocks), *trailing[part, name])
        if name == PUBLISHED_CLASSES:
            num_tokens = network.classes.num_tokens
            shape = (shape[0] // num_tokens, num_tokens * shape[1])
        elif name == PUBLISHED_QUERIES:
            shape = (1, *shape)
        tensors.append(PublishedTensor(name, shape, part, tuple(blocks), trailing[part, name]))
    return tensors


@dataclass(frozen=True)
class _Names:
    """Published names of a family that differ from those of another.

    Attributes:
        layer: beginning of the names of a layer, with its number to be filled in.
        qkv: in a layer, the tensors of the queries, the keys and the values; three or all the same.
        gate_up: the tensors of the gate and of the up projection; two or the same.
        attention_out: the output projection of the attention.
        down: the down projection.
        norms: the norms before attention and feed-forward.
        final_norm: the norm after the last layer.
        projector: beginning of the names of the projector.
        head: beginning of the names of the head.
    """

    layer: str
    qkv: tuple[str, str, str]
    gate_up: tuple[str, str]
    attention_out: str
    down: str
    norms: tuple[str, str]
    final_norm: str
    projector: str
    head: str


_QWEN3 = _Names(
    layer="model.layers.{}.",
    qkv=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    gate_up=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    attention_out="self_attn.o_proj.weight",
    down="mlp.down_proj.weight",
    norms=("input_layernorm.weight", "post_attention_layernorm.weight"),
    final_norm="model.norm.weight",
    projector="",
    head="",
)
# Published class-conditional release.
_CLASS_CONDITIONAL = _Names(
    layer="layers.{}.",
    qkv=("attention.wqkv.weight",) * 3,
    gate_up=("feed_forward.w1.weight",) * 2,
    attention_out="attention.wo.weight",
    down="feed_forward.w2.weight",
    norms=("attention_norm.weight", "ffn_norm.weight"),
    final_norm="norm.weight",
    projector="proj_in.",
    head="head.",
)


def _same(name: str, published: str, shape: tuple[int, ...], part: Part) -> NamedTensor:
    return NamedTensor(name, shape, part, (SharedRows(0, published, 0, shape[0]),))


def _stacked(name: str, columns: int, blocks: list[tuple[str, int, int]]) -> NamedTensor:
    """A backbone matrix that stacks blocks of (published name, first row there, number of rows)."""
    rows, start = [], 0
    for published, published_start, num_rows in blocks:
        rows.append(SharedRows(start, published, published_start, num_rows))
        start += num_rows
    return NamedTensor(name, (start, columns), Part.BACKBONE, tuple(rows))


def _embedding(network: NetworkConfig, vocab_size: int) -> NamedTensor:
    hidden = network.model.hidden_size
    if network.model.parts.has_text:
        return _same(EMBEDDING, PUBLISHED_EMBEDDING, (vocab_size, hidden), Part.BACKBONE)
    num_queries = network.vision.block_tokens - 1
    blocks = [(PUBLISHED_CLASSES, 0, vocab_size - num_queries), (PUBLISHED_QUERIES, 0, num_queries)]
    return _stacked(EMBEDDING, hidden, [block for block in blocks if block[2]])


def _layer(model: ModelSection, index: int, names: _Names) -> Iterator[NamedTensor]:
    ours, theirs, hidden = f"decoder.layers.{index}.", names.layer.format(index), model.hidden_size
    head_dim, group = model.head_dim, model.num_heads // model.num_kv_heads * model.head_dim
    sizes = (model.num_heads * head_dim, model.num_kv_heads * head_dim, model.num_kv_heads * head_dim)
    starts = _starts(names.qkv, sizes)
    qkv = [
        (theirs + name, start + kv_head * num_rows, num_rows)
        for kv_head in range(model.num_kv_heads)
        for name, start, num_rows in zip(names.qkv, starts, (group, head_dim, head_dim), strict=True)
    ]
    ffn_starts = _starts(names.gate_up, (model.ffn_size, model.ffn_size))
    gate_up = [(theirs + name, start, model.ffn_size) for name, start in zip(names.gate_up, ffn_starts, strict=True)]

    def vector(name: str, published: str, size: int) -> NamedTensor:
        return _same(ours + name + ".weight", theirs + published, (size,), Part.BACKBONE)

    yield vector("input_layernorm", names.norms[0], hidden)
    yield _stacked(ours + "self_attention.linear_qkv.weight", hidden, qkv)
    if model.parts.has_query_key_norms:
        yield vector("self_attention.q_layernorm", "self_attn.q_norm.weight", head_dim)
        yield vector("self_attention.k_layernorm", "self_attn.k_norm.weight", head_dim)
    attended = (hidden, model.num_heads * head_dim)
    yield _same(ours + "self_attention.linear_proj.weight", theirs + names.attention_out, attended, Part.BACKBONE)
    yield vector("pre_mlp_layernorm", names.norms[1], hidden)
    yield _stacked(ours + "mlp.linear_fc1.weight", hidden, gate_up)
    yield _same(ours + "mlp.linear_fc2.weight", theirs + names.down, (hidden, model.ffn_size), Part.BACKBONE)


def _starts(names: tuple[str, ...], num_rows: tuple[int, ...]) -> list[int]:
    """Where the rows of each begin, of tensors that may be stacked in one; they are if they have its name."""
    return [sum(num_rows[:number]) if names[0] == name else 0 for number, name in enumerate(names)]


def _projector(network: NetworkConfig) -> torch.nn.Module:
    projector = PROJECTORS[network.model.parts.projector]
    return projector(network.vision.num_bits, network.model.hidden_size, PlainLinears())


def _part_tensors(module: torch.nn.Module, prefix: str, published: str, part: Part) -> Iterator[NamedTensor]:
    for name, parameter in module.named_parameters():
        yield _same(f"{prefix}.{name}", published + name, tuple(parameter.shape), part)
