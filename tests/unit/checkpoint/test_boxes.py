from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance_scale.checkpoint.boxes import Box, disjoint_parts, find_overlap

SHAPE = (5, 4, 3)
OUTER = Box((0, 0, 0), SHAPE)


@st.composite
def boxes(draw):
    offsets = [draw(st.integers(0, n - 1)) for n in SHAPE]
    return Box(tuple(offsets), tuple(draw(st.integers(1, n - o)) for n, o in zip(SHAPE, offsets, strict=True)))


def filled(*parts: Box) -> np.ndarray:
    count = np.zeros(SHAPE, dtype=int)
    for part in parts:
        count[part.slices_in(OUTER)] += 1
    return count


@given(boxes(), boxes())
def test_intersection_and_difference(a, b):
    common = a.intersect(b)
    np.testing.assert_array_equal(filled(*([common] if common else [])), filled(a) * filled(b))
    np.testing.assert_array_equal(filled(*a.subtract(b)), filled(a) * (1 - filled(b)))


@given(boxes(), st.integers(1, 70))
def test_cut_parts_are_small_and_tile_the_box(box, max_elements):
    parts = list(box.cut(max_elements))
    assert all(part.num_elements <= max_elements for part in parts)
    np.testing.assert_array_equal(filled(*parts), filled(box))


@given(st.lists(boxes(), max_size=8))
@settings(max_examples=200)
def test_disjoint_parts_cover_what_the_boxes_cover(given_boxes):
    pairs = list(disjoint_parts(given_boxes))
    for box, part in pairs:
        assert box in given_boxes and box.intersect(part) == part
    covered = filled(*given_boxes) > 0
    np.testing.assert_array_equal(filled(*(part for _, part in pairs)), covered.astype(int))


@given(st.lists(boxes(), max_size=5))
def test_an_overlap_is_found_where_there_is_one(given_boxes):
    overlap = find_overlap(given_boxes)
    assert (overlap is not None) == (filled(*given_boxes).max() > 1)
    if overlap is not None:
        assert set(overlap) <= set(given_boxes) and overlap[0].intersect(overlap[1]) is not None


def test_scalars():
    scalar = Box((), ())
    assert scalar.num_elements == 1
    assert list(disjoint_parts([scalar, scalar])) == [(scalar, scalar)]
