"""Who sees whom in attention: the rule, and the same rule as intervals, as a count and as tiles.

`visible` is the rule: a position sees its own sample up to the end of its own block (arXiv 2602.14041 Sec. 3.3). The
positions of a sample are adjacent and block numbers never decrease along it. The keys that a position sees are
therefore one interval, whose ends never decrease along the pack, and the same holds for the queries that see a key. A
tile of a block-sparse mask follows from the intervals at its borders, without looking at any pair of positions.

Sizes: S positions, T positions per tile, R tile rows and columns = S / T rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

_Array = TypeVar("_Array", np.ndarray, "torch.Tensor")


def visible(document_ids: _Array, block_ids: _Array, num_queries: int | None = None) -> _Array:
    """The mask of a pack: position i sees j when both are of one sample and j's block is not after i's.

    Block numbers (`Pack.block_ids`) never decrease along a sample, so attention is causal over blocks and full within
    a block. Padding sees only padding, so every row has a visible position.

    Args:
        document_ids: int [.., S], numpy or torch; sample of each position, -1 for padding.
        block_ids: int [.., S], of the same kind; attention group within the sample.
        num_queries: only the last `num_queries` positions are queries, as in decoding with a cache; None: all.

    Returns:
        bool [.., num_queries, S], True where a query (row) sees a key (column).
    """
    first = 0 if num_queries is None else document_ids.shape[-1] - num_queries
    same_document = document_ids[..., first:, None] == document_ids[..., None, :]
    return same_document & (block_ids[..., None, :] <= block_ids[..., first:, None])


@dataclass(frozen=True)
class Bounds:
    """The keys j that every position i sees: first_key[i] <= j < stop_key[i]; position i is always one of them.

    Attributes:
        first_key, stop_key: int32 [S]; neither ever decreases.
    """

    first_key: np.ndarray
    stop_key: np.ndarray


def pack_bounds(document_ids: np.ndarray, block_ids: np.ndarray) -> Bounds:
    """The intervals of a pack.

    Args:
        document_ids: int [S], S at least 1, sample of each position; the padding (-1) counts as a sample.
        block_ids: int [S], attention group within the sample.

    Raises:
        ValueError: the positions of a sample are not adjacent, or its block numbers decrease.
    """
    is_new_document = document_ids[1:] != document_ids[:-1]
    block_steps = block_ids[1:] - block_ids[:-1]
    document_borders = _borders(is_new_document)
    if len(np.unique(document_ids[document_borders[:-1]])) < len(document_borders) - 1:
        raise ValueError("document_ids: the positions of a sample must be adjacent")
    if ((block_steps < 0) & ~is_new_document).any():
        raise ValueError("block_ids: must not decrease along a sample")
    block_borders = _borders(is_new_document | (block_steps != 0))
    return Bounds(
        first_key=np.repeat(document_borders[:-1], np.diff(document_borders)),
        stop_key=np.repeat(block_borders[1:], np.diff(block_borders)),
    )


def count_visible_pairs(document_ids: np.ndarray, block_ids: np.ndarray) -> int:
    """Pairs (query, key) of a pack where the query sees the key, the query itself included; padding has none.

    Arguments and errors as in `pack_bounds`.
    """
    bounds = pack_bounds(document_ids, block_ids)
    return int((bounds.stop_key - bounds.first_key)[document_ids >= 0].sum(dtype=np.int64))


def _borders(is_border: np.ndarray) -> np.ndarray:
    """int32, the starts of all runs, and S; is_border: bool [S - 1], whether a run ends after the position."""
    inner = np.flatnonzero(is_border) + 1
    return np.concatenate([[0], inner, [len(is_border) + 1]]).astype(np.int32)


@dataclass(frozen=True)
class TileRows:
    """Tiles row by row: the first num[r] entries of indices[r] are the columns of row r's tiles, ascending.

    The entries after those are valid columns without meaning.

    Attributes:
        num: int32 [R].
        indices: int32 [R, R].
    """

    num: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class Tiles:
    """The mask of a pack in tiles of T x T positions, as block-sparse attention kernels take it.

    In a full tile, which lies within the pack, every query sees every key; in a partial tile only some do. Forward
    passes go through the key tiles of a query tile, backward passes also through the query tiles of a key tile.

    Attributes:
        partial_keys, full_keys: one row per query tile, one column per key tile.
        partial_queries, full_queries: the same tiles, one row per key tile.
    """

    partial_keys: TileRows
    full_keys: TileRows
    partial_queries: TileRows
    full_queries: TileRows


def pack_tiles(bounds: Bounds, tile: int) -> Tiles:
    """The tiles of a pack; a ragged last tile (if T does not divide S) is never full.

    Args:
        bounds: the intervals of the pack.
        tile: T.
    """
    first_key, stop_key = bounds.first_key, bounds.stop_key
    size = len(first_key)
    # In the dtype of the bounds: otherwise every search would convert the bounds first.
    tops = np.arange(0, size, tile, dtype=np.int32)
    bottoms = np.minimum(tops + np.int32(tile), np.int32(size)) - np.int32(1)
    is_whole = bottoms - tops == tile - 1
    # One allocation: four large ones would be returned to the system when freed, and cost page faults for every pack.
    partial_keys, full_keys, partial_queries, full_queries = np.empty((4, len(tops), len(tops)), dtype=np.int32)
    keys = _tile_spans(first_key[tops], stop_key[tops], first_key[bottoms], stop_key[bottoms], tile, is_whole)

    # Neither end ever decreases, so the queries of a key j run from the first one that stops after j to the last one
    # that starts at j or before.
    def first_query(key: np.ndarray) -> np.ndarray:
        return np.searchsorted(stop_key, key, side="right")

    def stop_query(key: np.ndarray) -> np.ndarray:
        return np.searchsorted(first_key, key, side="right")

    queries = _tile_spans(
        first_query(tops), stop_query(tops), first_query(bottoms), stop_query(bottoms), tile, is_whole
    )
    windows = _windows(len(tops))
    return Tiles(
        partial_keys=_partial_rows(keys, windows, partial_keys),
        full_keys=_full_rows(keys, windows, full_keys),
        partial_queries=_partial_rows(queries, windows, partial_queries),
        full_queries=_full_rows(queries, windows, full_queries),
    )


@dataclass(frozen=True)
class _TileSpans:
    """Columns of the tiles of every row, int [R] each: those of all tiles, and of the full ones among them."""

    first: np.ndarray
    stop: np.ndarray
    first_full: np.ndarray
    num_full: np.ndarray


def _tile_spans(
    first_top: np.ndarray,
    stop_top: np.ndarray,
    first_bottom: np.ndarray,
    stop_bottom: np.ndarray,
    tile: int,
    is_whole: np.ndarray,
) -> _TileSpans:
    """The columns, from the intervals of the top and the bottom position of every tile row; int [R] each.

    The ends never decrease and each position is in its own interval. The union of a row's intervals is therefore one
    interval, from `first_top` to `stop_bottom`, and their intersection runs from `first_bottom` to `stop_top`.
    """
    first_full = -(-first_bottom // tile)
    num_full = np.where(is_whole, np.maximum(stop_top // tile - first_full, 0), 0)
    first, stop = first_top // tile, (stop_bottom - 1) // tile + 1
    # Without a full tile, the full ones "start" at the first column: all partial ones are then to their right.
    return _TileSpans(first, stop, np.where(num_full > 0, first_full, first), num_full)


def _partial_rows(spans: _TileSpans, windows: np.ndarray, indices: np.ndarray) -> TileRows:
    """The tiles of the spans left and right of the full ones; `indices`, int32 [R, R], is filled."""
    num_left = spans.first_full - spans.first
    windows.take(spans.first + spans.num_full, axis=0, out=indices, mode="clip")
    rows = np.repeat(np.arange(len(indices)), num_left)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(num_left) - num_left, num_left)
    indices[rows, columns] = spans.first[rows] + columns
    return TileRows((spans.stop - spans.first - spans.num_full).astype(np.int32), indices)


def _full_rows(spans: _TileSpans, windows: np.ndarray, indices: np.ndarray) -> TileRows:
    """The full tiles of the spans; `indices`, int32 [R, R], is filled."""
    windows.take(spans.first_full, axis=0, out=indices, mode="clip")
    return TileRows(spans.num_full.astype(np.int32), indices)


def _windows(size: int) -> np.ndarray:
    """int32 [size + 1, size]; row i is i, i + 1, .. modulo size. Copying rows of it is faster than computing them."""
    ring = np.arange(2 * size, dtype=np.int32) % size
    # Contiguous, so that `take` copies whole rows; only its mode "clip" needs no buffer.
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ring, size))
