"""Block-causal attention under the mask of a pack (arXiv 2602.14041 Sec. 3.3).

`sequence/visibility.py` defines who sees whom. The mask of a pack has two equivalent forms. `DocumentMask` is dense
within each sample, for PyTorch's scaled dot-product attention on any device. `FlexMask` holds intervals and tiles for
FlexAttention, whose CUDA kernels skip what nobody sees.

Shape suffixes: S query positions, T key positions, B batch, N query heads, G key/value heads, K head size, R tile rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from einops import rearrange
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bitdance_scale.config.model_rules import MIN_FLEX_HEAD_DIM
from bitdance_scale.config.schema import ModelSection
from bitdance_scale.sequence.visibility import TileRows, pack_bounds, pack_tiles, visible

# Positions per side of a tile; FlexAttention's kernels are tuned for this size.
FLEX_TILE = 128
# Inductor chooses 4 or 8 warps by dtype, head size and GPU. With 4, a thread has twice as many numbers to hold, and
# spills kilobytes of them: forward at 64 channels and in float32, backward on Blackwell (docs/benchmarks.md).
_NUM_WARPS = 8


def attend(
    query_SBNK: torch.Tensor, key_TBGK: torch.Tensor, value_TBGK: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Scaled dot-product attention with grouped queries: N / G adjacent query heads share a key/value head.

    Args:
        query_SBNK: float, the queries.
        key_TBGK: float, the keys; G divides N.
        value_TBGK: float, the values.
        mask: bool, broadcastable to [B, N, S, T], True where a query sees a key.

    Returns:
        [S, B, N, K] in the dtype of the query.
    """
    # Heads are repeated here because with `enable_gqa` CUDA has only kernels without masks and one that stores the
    # whole score matrix.
    group_size = query_SBNK.shape[2] // key_TBGK.shape[2]
    key_TBNK = key_TBGK.repeat_interleave(group_size, dim=2)
    value_TBNK = value_TBGK.repeat_interleave(group_size, dim=2)
    mixed_BNSK = functional.scaled_dot_product_attention(
        rearrange(query_SBNK, "s b n k -> b n s k"),
        rearrange(key_TBNK, "t b n k -> b n t k"),
        rearrange(value_TBNK, "t b n k -> b n t k"),
        attn_mask=mask,
    )
    return rearrange(mixed_BNSK, "b n s k -> s b n k")


def attend_grouped(
    query_BNSK: torch.Tensor,
    key_BGTK: torch.Tensor,
    value_BGTK: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """`attend` for decoding: no key is repeated.

    The queries of a block see the same keys, so the query heads that share a key/value head are stacked along the
    queries.

    Args:
        query_BNSK: the queries of the new positions.
        key_BGTK: the keys seen; G divides N.
        value_BGTK: their values.
        mask: [B, 1, S or 1, T], added to the scores; 1 where all queries see the same.
        scale: of the scores; None: 1 / sqrt(K).

    Returns:
        [B, N, S, K] in the dtype of the query.
    """
    num_sequences, num_heads, _, size = query_BNSK.shape
    num_groups = key_BGTK.shape[1]
    if mask.shape[2] > 1:
        mask = mask.repeat(1, 1, num_heads // num_groups, 1)
    stacked = query_BNSK.reshape(num_sequences, num_groups, -1, size)
    mixed = functional.scaled_dot_product_attention(stacked, key_BGTK, value_BGTK, attn_mask=mask, scale=scale)
    return mixed.reshape(query_BNSK.shape)


class PackMask(Protocol):
    """The mask of a pack in one of its forms.

    Attributes:
        keeps_scores: whether attention may keep more than its arguments, its result and a number per query and head
            for the backward pass: repeated keys and values, scores.
    """

    keeps_scores: ClassVar[bool]

    def attend(self, query_SBNK: torch.Tensor, key_SBGK: torch.Tensor, value_SBGK: torch.Tensor) -> torch.Tensor:
        """Attention under the mask; result and heads as in the function `attend`, [S, B, N, K]."""
        ...


def pack_mask(document_ids: np.ndarray, block_ids: np.ndarray, section: ModelSection, device: torch.device) -> PackMask:
    """The mask of a pack in the form that `model.attention` asks for.

    Args:
        document_ids: int [S], sample of each position, -1 for padding; the positions of a sample are adjacent.
        block_ids: int [S], attention group within the sample, never decreasing along it.
        section: `attention` and `head_dim`.
        device: where the mask is used.
    """
    make = flex_mask if uses_flex(section, device) else document_mask
    return make(document_ids, block_ids, device)


def uses_flex(section: ModelSection, device: torch.device) -> bool:
    """Whether masks on a device are for FlexAttention; with `auto`, only where its kernels can train, on CUDA."""
    has_kernels = device.type == "cuda" and section.head_dim >= MIN_FLEX_HEAD_DIM
    return section.attention == "flex" or (section.attention == "auto" and has_kernels)


@dataclass(frozen=True)
class DocumentMask:
    """The mask of a pack, sample by sample: pairs between samples, which nobody sees, are never computed.

    With n samples of equal length it costs 1 / n of a dense mask over the whole pack, in time and in memory.

    Attributes:
        spans: (start, stop) of each sample's positions, and of the padding.
        masks: bool [stop - start, stop - start] of each span, True where a position (row) sees another (column).
    """

    keeps_scores: ClassVar[bool] = True
    spans: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor, ...]

    def attend(self, query_SBNK: torch.Tensor, key_SBGK: torch.Tensor, value_SBGK: torch.Tensor) -> torch.Tensor:
        """`attend` within every span; [S, B, N, K]."""
        parts = [
            attend(query_SBNK[start:stop], key_SBGK[start:stop], value_SBGK[start:stop], mask)
            for (start, stop), mask in zip(self.spans, self.masks, strict=True)
        ]
        return torch.cat(parts)


def document_mask(document_ids: np.ndarray, block_ids: np.ndarray, device: torch.device) -> DocumentMask:
    """The mask of a pack, dense within its samples.

    Args:
        document_ids: int [S], sample of each position, -1 for padding; the positions of a sample are adjacent.
        block_ids: int [S], attention group within the sample.
        device: where the masks are made.
    """
    borders = [0, *(np.flatnonzero(np.diff(document_ids)) + 1).tolist(), len(document_ids)]
    spans = tuple(itertools.pairwise(borders))
    documents, blocks = to_device(document_ids, device), to_device(block_ids, device)
    masks = tuple(visible(documents[start:stop], blocks[start:stop]) for start, stop in spans)
    return DocumentMask(spans, masks)


@dataclass(frozen=True)
class FlexMask:
    """The mask of a pack for FlexAttention: its intervals, and the tiles that hold anything to see.

    Attributes:
        first_key, stop_key: int32 [S]; a query i sees the keys first_key[i] <= j < stop_key[i].
        tiles: int32, counts [1, 1, R] and indices [1, 1, R, R] of the partial key tiles of each query tile, then of the
            full ones; then the same of the query tiles of each key tile.
        tile: positions per side of a tile.
        is_compiled: whether attention is compiled into kernels, which have no backward pass on the CPU. Uncompiled,
            FlexAttention computes all pairs and masks them, and `tiles` have no effect.
    """

    keeps_scores: ClassVar[bool] = False
    first_key: torch.Tensor
    stop_key: torch.Tensor
    tiles: tuple[torch.Tensor, ...]
    tile: int
    is_compiled: bool

    def attend(self, query_SBNK: torch.Tensor, key_SBGK: torch.Tensor, value_SBGK: torch.Tensor) -> torch.Tensor:
        """Attention under the mask; [S, B, N, K] in the dtype of the query."""
        size, bounds = len(self.first_key), (self.first_key, self.stop_key)
        if self.is_compiled:
            # Marked one by one: with dynamic=True the compiler would take a head size that happens to equal R or S for
            # the same number, and compile again for the next pack.
            for heads in (query_SBNK, key_SBGK, value_SBGK):
                torch._dynamo.mark_dynamic(heads, 0)
            return _compiled_mix()(
                query_SBNK, key_SBGK, value_SBGK, *bounds, self.tiles, self.tile, size % self.tile == 0
            )
        query_BNSK, key_BGSK, value_BGSK = _heads_first(query_SBNK, key_SBGK, value_SBGK)
        block_mask = _block_mask(size, *bounds, self.tiles, self.tile)
        return rearrange(_mix_eagerly(query_BNSK, key_BGSK, value_BGSK, block_mask), "b n s k -> s b n k")


def flex_mask(
    document_ids: np.ndarray,
    block_ids: np.ndarray,
    device: torch.device,
    tile: int = FLEX_TILE,
    is_compiled: bool | None = None,
) -> FlexMask:
    """The mask of a pack as intervals and tiles.

    Args:
        document_ids: int [S], sample of each position, -1 for padding; the positions of a sample are adjacent.
        block_ids: int [S], attention group within the sample, never decreasing along it.
        device: where the mask is used.
        tile: positions per side of a tile.
        is_compiled: see `FlexMask`; None: only on CUDA.

    Raises:
        ValueError: the positions of a sample are not adjacent, or its block numbers decrease.
    """
    bounds = pack_bounds(document_ids, block_ids)
    tiles = pack_tiles(bounds, tile)
    first_key, stop_key = to_device(bounds.first_key, device), to_device(bounds.stop_key, device)
    rows = [
        to_device(array, device)[None, None]
        for part in (tiles.partial_keys, tiles.full_keys, tiles.partial_queries, tiles.full_queries)
        for array in _at_least_two(part)
    ]
    for tensor in (first_key, stop_key):
        torch._dynamo.mark_dynamic(tensor, 0)
    for tensor in rows:
        torch._dynamo.mark_dynamic(tensor, list(range(2, tensor.dim())))
    if is_compiled is None:
        is_compiled = device.type == "cuda"
    return FlexMask(first_key, stop_key, tuple(rows), tile, is_compiled)


def _at_least_two(rows: TileRows) -> tuple[np.ndarray, np.ndarray]:
    """(num, indices), with an empty second row if there is one tile: the compiler specialises on a size of 1."""
    if len(rows.num) > 1:
        return rows.num, rows.indices
    return np.pad(rows.num, (0, 1)), np.pad(rows.indices, (0, 1))


def _block_mask(
    size: int, first_key: torch.Tensor, stop_key: torch.Tensor, tiles: tuple[torch.Tensor, ...], tile: int
) -> BlockMask:
    """A `FlexMask` over `size` positions as FlexAttention takes it."""

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (first_key[query] <= key) & (key < stop_key[query])

    return BlockMask(
        seq_lengths=(size, size),
        kv_num_blocks=tiles[0],
        kv_indices=tiles[1],
        full_kv_num_blocks=tiles[2],
        full_kv_indices=tiles[3],
        q_num_blocks=tiles[4],
        q_indices=tiles[5],
        full_q_num_blocks=tiles[6],
        full_q_indices=tiles[7],
        BLOCK_SIZE=(tile, tile),
        mask_mod=is_seen,
    )


def _mix(
    query_SBNK: torch.Tensor,
    key_SBGK: torch.Tensor,
    value_SBGK: torch.Tensor,
    first_key: torch.Tensor,
    stop_key: torch.Tensor,
    tiles: tuple[torch.Tensor, ...],
    tile: int,
    is_whole: bool,
) -> torch.Tensor:
    """FlexAttention under a `FlexMask`, to be compiled; `is_whole`: whether the tile divides S.

    The BlockMask is made in here, from tensors only, so that the compiler sees its lengths as sizes of tensors rather
    than as numbers of one pack. Heads are moved to the front in here too: the gradient of a result with dynamic sizes
    must be contiguous, and is copied if it is not.
    """
    size = query_SBNK.shape[0]
    # The compiler would otherwise take these for five different lengths.
    for length in (key_SBGK.shape[0], value_SBGK.shape[0], first_key.shape[0], stop_key.shape[0]):
        torch._check(length == size)
    if is_whole:
        # Lets the kernels omit their checks for a ragged end.
        torch._check(size % tile == 0)
    query_BNSK, key_BGSK, value_BGSK = _heads_first(query_SBNK, key_SBGK, value_SBGK)
    # Any: its types do not know of options for the kernels alone.
    attention: Any = flex_attention
    mixed_BNSK: torch.Tensor = attention(
        query_BNSK,
        key_BGSK,
        value_BGSK,
        block_mask=_block_mask(size, first_key, stop_key, tiles, tile),
        enable_gqa=True,
        # Packs of less than one tile would otherwise get a kernel of their own, for decoding.
        kernel_options={"BACKEND": "TRITON", "num_warps": _NUM_WARPS},
    )
    return mixed_BNSK.permute(2, 0, 1, 3)


def _heads_first(*heads_SBNK: torch.Tensor) -> Iterator[torch.Tensor]:
    """[S, B, N, K] to [B, N, S, K], as views."""
    return (heads.permute(1, 2, 0, 3) for heads in heads_SBNK)


@functools.cache
def _compiled_mix() -> Callable[..., torch.Tensor]:
    """`_mix` compiled for packs of any length, once per process (twice if some packs end in a ragged tile)."""
    # Positions index the intervals and cannot be out of range. The check would be in the inner loop, and in the CPU
    # kernels of torch 2.11 to 2.13 it compares with a wrong length.
    return torch.compile(_mix, fullgraph=True, options={"assert_indirect_indexing": False})


def _mix_eagerly(
    query_BNSK: torch.Tensor, key_BGSK: torch.Tensor, value_BGSK: torch.Tensor, block_mask: BlockMask
) -> torch.Tensor:
    """FlexAttention's operator itself, which has a dense implementation with a gradient on every device.

    `flex_attention` refuses inputs that require a gradient on the CPU, because its compiled kernels have none there.
    """

    def unchanged(score: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        return score

    scale = query_BNSK.shape[-1] ** -0.5
    mixed_BNSK, _, _ = flex_operator(
        query_BNSK, key_BGSK, value_BGSK, unchanged, block_mask.as_tuple(), scale, {"OUTPUT_LOGSUMEXP": True}
    )
    return mixed_BNSK


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of a pack as a tensor on a device, of the same shape and dtype.

    On the CPU the two share memory. Copies to CUDA go through pinned memory; other copies would first wait for all work
    in their stream.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
