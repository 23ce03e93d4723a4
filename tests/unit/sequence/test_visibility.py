"""Intervals against the rule on pairs; tiles against PyTorch's own, which evaluates the rule on every pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from bitdance_scale.sequence.layout import ImageTokens, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample
from bitdance_scale.sequence.visibility import TileRows, Tiles, count_visible_pairs, pack_bounds, pack_tiles, visible

NUM_PACKS = 260  # for each of the eight cases, 2080 in all
MAX_CELLS = 32


def expand(documents: list[tuple[int, list[tuple[int, int]]]]) -> tuple[np.ndarray, np.ndarray]:
    """(document_ids, block_ids) of documents given as (id, [(step of the block number, positions), ..])."""
    document_ids, block_ids = [], []
    for number, blocks in documents:
        block = 0
        for step, size in blocks:
            block += step
            document_ids += [number] * size
            block_ids += [block] * size
    return np.array(document_ids, dtype=np.int32), np.array(block_ids, dtype=np.int32)


BLOCKS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=8)
DOCUMENTS = st.lists(st.tuples(st.integers(-1, 50), BLOCKS), min_size=1, max_size=6, unique_by=lambda item: item[0])


@given(DOCUMENTS)
def test_intervals_are_the_rule(documents):
    document_ids, block_ids = expand(documents)
    bounds = pack_bounds(document_ids, block_ids)
    keys = np.arange(len(document_ids))
    found = (bounds.first_key[:, None] <= keys) & (keys < bounds.stop_key[:, None])
    expected = visible(document_ids, block_ids)
    np.testing.assert_array_equal(found, expected)
    assert count_visible_pairs(document_ids, block_ids) == expected[document_ids >= 0].sum()
    assert bounds.first_key.dtype == bounds.stop_key.dtype == np.int32


def test_visible_pairs_by_hand():
    # Document 0: blocks of 1 and 2 positions see 1 + 2 * 3 pairs; document 1: 1 + 2; padding none.
    documents, blocks = np.array([0, 0, 0, 1, 1, -1, -1]), np.array([0, 1, 1, 0, 1, 0, 1])
    assert count_visible_pairs(documents, blocks) == 10
    assert count_visible_pairs(np.array([-1, -1]), np.array([0, 1])) == 0


@pytest.mark.parametrize(
    ("document_ids", "block_ids", "message"),
    [([0, 1, 0], [0, 0, 0], "document_ids: .* adjacent"), ([0, 0, 1], [1, 0, 0], "block_ids: must not decrease")],
)
def test_ids_without_intervals_are_refused(document_ids, block_ids, message):
    with pytest.raises(ValueError, match=message):
        pack_bounds(np.array(document_ids), np.array(block_ids))


def random_pack(numbers: np.random.Generator, side: int, tile: int) -> Pack:
    """Up to three samples of either kind, with captions of up to 60 tokens; some packs end in a ragged tile."""
    tokens = ImageTokens(1, 2, resolution=tuple(range(10, 10 + MAX_CELLS)), queries=tuple(range(50, 49 + side**2)))
    samples = []
    for key in range(numbers.integers(1, 4)):
        # Sides from 1 block to MAX_CELLS cells, small ones more often, as the reference takes time with the square of a
        # pack.
        largest = int(numbers.choice([2 * side, MAX_CELLS], p=[0.97, 0.03])) // side
        grid = (int(numbers.integers(1, largest + 1)) * side, int(numbers.integers(1, largest + 1)) * side)
        num_before, num_after = numbers.integers(0, 61), numbers.integers(1, 61)
        samples.append(
            Sample(key, grid, np.full(num_before, 100), np.full(num_after, 200), 1, 1, bool(numbers.random() < 0.7))
        )
    return pack_samples(samples, tokens, pack_multiple=int(numbers.choice([1, 8, tile, 128])))


def torch_mask(pack: Pack, tile: int) -> BlockMask:
    """PyTorch's tiles of the rule itself, on document and block numbers."""
    documents, blocks = torch.from_numpy(pack.document_ids), torch.from_numpy(pack.block_ids)

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (documents[query] == documents[key]) & (blocks[key] <= blocks[query])

    size = pack.num_positions
    return create_block_mask(is_seen, None, None, size, size, device="cpu", BLOCK_SIZE=tile)


def as_dense(part: TileRows) -> np.ndarray:
    """Bool [R, R], True where there is a tile of this part."""
    dense = np.zeros_like(part.indices, dtype=bool)
    for row, (num, columns) in enumerate(zip(part.num, part.indices, strict=True)):
        dense[row, columns[:num]] = True
    return dense


def assert_same(tiles: Tiles, expected: BlockMask) -> None:
    pairs = {
        "partial keys": (tiles.partial_keys, expected.kv_num_blocks, expected.kv_indices),
        "full keys": (tiles.full_keys, expected.full_kv_num_blocks, expected.full_kv_indices),
        "partial queries": (tiles.partial_queries, expected.q_num_blocks, expected.q_indices),
        "full queries": (tiles.full_queries, expected.full_q_num_blocks, expected.full_q_indices),
    }
    for name, (found, expected_num, expected_indices) in pairs.items():
        num, indices = expected_num[0, 0].numpy(), expected_indices[0, 0].numpy()
        np.testing.assert_array_equal(found.num, num, err_msg=name)
        counts = np.arange(indices.shape[1]) < num[:, None]
        np.testing.assert_array_equal(found.indices[counts], indices[counts], err_msg=name)
        assert found.num.dtype == found.indices.dtype == np.int32 and found.indices.shape == indices.shape
        # A kernel may read the entry after the last one, so it must be a tile that exists.
        assert (found.indices >= 0).all() and (found.indices < len(num)).all(), name
    assert (as_dense(tiles.partial_keys) | as_dense(tiles.full_keys) == expected.to_dense()[0, 0].bool().numpy()).all()


@pytest.mark.parametrize(("side", "tile"), [(4, 16), (8, 32), (4, 64), (8, 128)])
def test_tiles_are_those_of_torch(side, tile):
    numbers = np.random.default_rng(100 * side + tile)
    num_full = num_ragged = num_left = 0
    for _ in range(NUM_PACKS):
        pack = random_pack(numbers, side, tile)
        tiles = pack_tiles(pack_bounds(pack.document_ids, pack.block_ids), tile)
        assert_same(tiles, torch_mask(pack, tile))
        num_full += int(tiles.full_keys.num.sum())
        num_ragged += pack.num_positions % tile > 0
        # Rows whose first tile is partial and whose next one is full: partial tiles on both sides of full ones.
        num_left += int(
            (tiles.partial_keys.indices[:, 0] < tiles.full_keys.indices[:, 0])[tiles.full_keys.num > 0].sum()
        )
    assert num_full > 100 and num_ragged > 50 and num_left > 10, "the packs must show all kinds of tiles"


def test_a_pack_of_one_sample_in_few_tiles_by_hand():
    """Text of 3, a block of 4, text of 1, in tiles of 4 positions: the second row holds two kinds of tiles."""
    bounds = pack_bounds(np.zeros(8, dtype=np.int32), np.array([0, 1, 2, 3, 3, 3, 3, 4], dtype=np.int32))
    assert bounds.stop_key.tolist() == [1, 2, 3, 7, 7, 7, 7, 8]
    tiles = pack_tiles(bounds, 4)
    assert tiles.partial_keys.num.tolist() == [2, 1] and tiles.full_keys.num.tolist() == [0, 1]
    assert tiles.partial_keys.indices[0].tolist() == [0, 1] and tiles.partial_keys.indices[1, 0] == 1
    assert tiles.full_keys.indices[1, 0] == 0
    assert tiles.partial_queries.num.tolist() == [1, 2] and tiles.full_queries.num.tolist() == [1, 0]
