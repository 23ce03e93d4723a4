"""Who sees whom as intervals, and the tiles of a block-sparse mask derived from their ends.

The rule is that of `visible` in `model/attention.py`: a position sees its own sample up to the end of its own block.
The positions of a sample are neighbours and block numbers never decrease along it, so the keys that a position sees are
one interval whose ends never decrease along the pack. The same then holds for the queries that see a key. A tile of
the mask is therefore known from the intervals at its borders, and no pair of positions is ever looked at.

Sizes: S positions, T positions per tile, R tile rows and columns = S / T rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bounds:
    """The keys that every position sees: first_key[i] <= j < stop_key[i], position i itself always among them.

    Attributes:
        first_key, stop_key: int32 [S], neither ever decreasing.
    """

    first_key: np.ndarray
    stop_key: np.ndarray


def pack_bounds(document_ids: np.ndarray, block_ids: np.ndarray) -> Bounds:
    """The intervals of a pack.

    Args:
        document_ids: int [S], S at least 1, sample of each position; the padding (-1) counts as a sample.
        block_ids: int [S], attention group within the sample.

    Raises:
        ValueError: the positions of a sample are no neighbours, or its block numbers decrease.
    """
    is_new_document = document_ids[1:] != document_ids[:-1]
    block_steps = block_ids[1:] - block_ids[:-1]
    document_borders = _borders(is_new_document)
    if len(np.unique(document_ids[document_borders[:-1]])) < len(document_borders) - 1:
        raise ValueError("document_ids: the positions of a sample must be neighbours")
    if ((block_steps < 0) & ~is_new_document).any():
        raise ValueError("block_ids: must not decrease along a sample")
    block_borders = _borders(is_new_document | (block_steps != 0))
    return Bounds(
        first_key=np.repeat(document_borders[:-1], np.diff(document_borders)),
        stop_key=np.repeat(block_borders[1:], np.diff(block_borders)),
    )


def _borders(is_border: np.ndarray) -> np.ndarray:
    """int32, the starts of all runs and S; is_border: bool [S - 1], whether a run ends behind the position."""
    inner = np.flatnonzero(is_border) + 1
    return np.concatenate([[0], inner, [len(is_border) + 1]]).astype(np.int32)


@dataclass(frozen=True)
class TileRows:
    """Tiles row by row: the first num[r] entries of indices[r] are, ascending, the columns of row r's tiles.

    The entries behind those are columns too, without meaning.

    Attributes:
        num: int32 [R].
        indices: int32 [R, R].
    """

    num: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class Tiles:
    """The mask of a pack in tiles of T x T positions, as block-sparse attention kernels take it.

    A full tile lies within the pack and all its pairs see each other; a partial one has pairs that do, and others.
    Forward passes walk the keys of a query tile, backward passes also the queries of a key tile.

    Attributes:
        partial_keys, full_keys: one row per query tile, one column per key tile.
        partial_queries, full_queries: the same tiles, one row per key tile.
    """

    partial_keys: TileRows
    full_keys: TileRows
    partial_queries: TileRows
    full_queries: TileRows


def pack_tiles(bounds: Bounds, tile: int) -> Tiles:
    """The tiles of a pack; a ragged last tile (S no multiple of T) is never full.

    Args:
        bounds: the intervals of the pack.
        tile: T.
    """
    first_key, stop_key = bounds.first_key, bounds.stop_key
    size = len(first_key)
    # In the dtype of the bounds, or every search would convert them first.
    tops = np.arange(0, size, tile, dtype=np.int32)
    bottoms = np.minimum(tops + np.int32(tile), np.int32(size)) - np.int32(1)
    is_whole = bottoms - tops == tile - 1
    # One allocation: a process that frees four large ones gives the pages back and pays for them again at every pack.
    partial_keys, full_keys, partial_queries, full_queries = np.empty((4, len(tops), len(tops)), dtype=np.int32)
    keys = _tile_spans(first_key[tops], stop_key[tops], first_key[bottoms], stop_key[bottoms], tile, is_whole)

    # Both ends never decrease, so that the queries of a key j are those from the first that reaches behind j up to the
    # last that starts at j or before.
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
    """Columns of the tiles of every row, int [R] each: all from first to stop, the full ones among them."""

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
    """From the intervals of the top and the bottom position of every tile row; int [R] each.

    Ends never decrease and each position is in its own interval: together the positions of a row meet one interval,
    from the first of the top to the stop of the bottom position, and what they all meet is the overlap of these two.
    """
    first_full = -(-first_bottom // tile)
    num_full = np.where(is_whole, np.maximum(stop_top // tile - first_full, 0), 0)
    first, stop = first_top // tile, (stop_bottom - 1) // tile + 1
    # Where there is none, "full" tiles start with the first: all partial ones then stand to their right.
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
    """int32 [size + 1, size], row i holding i, i + 1, .. modulo size: index rows are copied out of it, not counted."""
    ring = np.arange(2 * size, dtype=np.int32) % size
    # Contiguous, so that `take` copies rows straight into place; its mode "clip" is the one that needs no buffer.
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ring, size))
