from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance_scale.parallel.partition import (
    Placement,
    ShardedValue,
    fragment_pieces,
    whole_pieces,
)


@st.composite
def split_tensors(draw):
    """(global array, dim, per rank: (local array with padding, placement)) of a random tensor-parallel split."""
    num_ranks = draw(st.integers(1, 4))
    num_chunks = draw(st.integers(1, 3))
    ndim = draw(st.integers(1, 4))
    dim = draw(st.integers(0, ndim - 1))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[dim] = num_ranks * num_chunks * draw(st.integers(1, 3))
    padding = draw(st.integers(0, shape[dim] - 1)) if num_chunks == 1 else 0
    padded = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    whole = np.take(padded, range(shape[dim] - padding), axis=dim)
    chunks = np.split(padded, num_chunks, axis=dim)
    locals_ = [
        np.concatenate([np.split(chunk, num_ranks, axis=dim)[rank] for chunk in chunks], axis=dim)
        for rank in range(num_ranks)
    ]
    placements = [
        Placement.split(local.shape, dim, rank, num_ranks, num_chunks, valid_length=whole.shape[dim])
        for rank, local in enumerate(locals_)
    ]
    return whole, list(zip(locals_, placements, strict=True))


def assemble(values: list[ShardedValue]) -> tuple[np.ndarray, np.ndarray]:
    """The global tensor put together from pieces, and how often each element was written."""
    shape = values[0].global_shape
    result, count = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for value in values:
        assert value.global_shape == shape
        for piece in value.pieces:
            assert piece.tensor.numel() > 0 and piece.tensor.dtype == value.dtype
            where = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))
            result[where] = piece.tensor.numpy()
            count[where] += 1
    return result, count


@given(split_tensors())
@settings(max_examples=150, deadline=None)
def test_whole_pieces_tile_the_global_tensor(case):
    whole, ranks = case
    result, count = assemble([whole_pieces(torch.from_numpy(local), placement) for local, placement in ranks])
    assert (count == 1).all()
    np.testing.assert_array_equal(result, whole)


@given(split_tensors(), st.data())
@settings(max_examples=300, deadline=None)
def test_fragments_tile_the_global_tensor(case, data):
    whole, ranks = case
    values = []
    for local, placement in ranks:
        flat = torch.from_numpy(local.reshape(-1).copy())
        cuts = sorted(data.draw(st.lists(st.integers(0, flat.numel()), max_size=4)))
        for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            value = fragment_pieces(flat[start:stop], start, placement)
            assert len(value.pieces) <= (2 * local.ndim - 1) * max(len(placement.blocks), 1)
            values.append(value)
    result, count = assemble(values)
    assert (count == 1).all()
    np.testing.assert_array_equal(result, whole)


@given(split_tensors(), st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_are_views_of_the_fragment(case, data):
    _, ranks = case
    local, placement = ranks[-1]
    flat = torch.from_numpy(local.reshape(-1).copy())
    start = data.draw(st.integers(0, flat.numel()))
    fragment = flat[start:]
    pieces = fragment_pieces(fragment, start, placement).pieces
    for piece in pieces:
        piece.tensor.fill_(-7)
    assert int((flat == -7).sum()) == sum(piece.tensor.numel() for piece in pieces)


def test_an_empty_fragment_holds_nothing_wherever_it_starts():
    assert fragment_pieces(torch.zeros(0), 9, Placement.replicated((2, 3))).pieces == ()


def test_a_scalar_is_one_piece():
    value = fragment_pieces(torch.tensor([3.0]), 0, Placement.replicated(()))
    assert [(piece.offsets, piece.tensor.item()) for piece in value.pieces] == [((), 3.0)]


def test_a_parameter_that_needs_gradients_can_be_written_through():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    whole_pieces(parameter, Placement.replicated((2, 3))).pieces[0].tensor.fill_(1.0)
    assert parameter.sum().item() == 6.0


@given(split_tensors())
@settings(max_examples=100, deadline=None)
def test_local_part_is_the_slice_with_zero_padding(case):
    whole, ranks = case
    for local, placement in ranks:
        part = placement.local_part(torch.from_numpy(whole)).numpy()
        is_valid = np.isin(local, whole)
        np.testing.assert_array_equal(part, np.where(is_valid, local, 0))


def test_a_rank_of_padding_only_holds_nothing():
    # 5 rows padded to 8 over 4 ranks: rank 2 holds row 4 and a padding row, rank 3 padding alone.
    assert Placement.split((2, 2), 0, 2, 4, valid_length=5).blocks == ((0, 4, 1),)
    placement = Placement.split((2, 2), 0, 3, 4, valid_length=5)
    assert whole_pieces(torch.zeros(2, 2), placement).pieces == ()


def test_stacked_matrices_are_split_one_by_one():
    placement = Placement.split((6, 3), 0, 1, 2, num_chunks=2)
    assert placement.global_shape == (12, 3)
    assert placement.blocks == ((0, 3, 3), (3, 9, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Placement.split((5, 2), 0, 0, 4, num_chunks=2),
        lambda: Placement((4,), (4,), 0, ((0, 2, 3),)),
        lambda: Placement((4,), (4,), 0, ((2, 0, 2), (0, 2, 2))),
        lambda: fragment_pieces(torch.zeros(5), 2, Placement.replicated((2, 3))),
    ],
    ids=["uneven", "outside", "unordered", "too long"],
)
def test_impossible_cuts_are_refused(make):
    with pytest.raises(AssertionError):
        make()
