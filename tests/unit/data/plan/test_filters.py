"""Filters: which samples they leave out, what is counted, and that a plan draws only what is left."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bitdance_scale.config.data_schema import DataFilter, DataSource, Resolution
from bitdance_scale.data.plan.filters import describe
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.plan.selection import SAMPLES_PER_CHUNK, select
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import bare_index

SOURCE = DataSource(name="open", shards=("x",), share=1)
ANY_SIZE = Resolution(side_px=1, share=1, buckets_px=((1, 1),))
NAN = float("nan")


def test_filters_count_what_they_leave_out_one_after_the_other(make_config) -> None:
    height = np.array([10, 20, 30, 40, 50, 60, 7])
    width = np.array([10, 10, 30, 10, 50, 60, 7])
    score = np.array([0.1, 0.2, 0.9, 0.1, NAN, NAN, 0.3], np.float32)
    index = bare_index(height, width, punsafe=score)
    rules = [
        DataFilter(column="short_side_px", min=8),
        DataFilter(column="aspect", max=2),
        DataFilter(column="punsafe", max=0.5),
        DataFilter(column="pixels", max=1, source="another"),
    ]
    data = make_config(sources=(SOURCE,), filters=tuple(rules), resolutions=(ANY_SIZE,)).data

    def passing(rules: list[DataFilter]) -> list[bool]:
        selection = select(index, dataclasses.replace(data, filters=tuple(rules)))
        return selection.eligible[0, ANY_SIZE.side_px].contains(np.arange(7)).tolist()

    assert passing(rules) == [True, True, False, False, False, False, False]
    (counts,) = select(index, data).counts
    assert [(c.num_outside, c.num_missing, c.num_kept) for c in counts] == [(1, 0, 6), (1, 0, 5), (1, 2, 2)]
    assert describe(counts[2]) == "punsafe <= 0.5: leaves out 1 by value and 2 without a value; 2 left"
    lenient = [*rules[:2], dataclasses.replace(rules[2], missing="keep")]
    assert passing(lenient) == [True, True, False, False, True, True, False]
    with pytest.raises(DataError, match="'unsafe' is neither a size nor a numeric field.*fields found: punsafe"):
        passing([DataFilter(column="unsafe", max=1)])


def test_a_plan_draws_what_its_filters_keep(make_config) -> None:
    """In a source that begins in the middle of the index and of a chunk of it."""
    count = 5000
    numbers = np.random.default_rng(0)
    sides = np.full(SAMPLES_PER_CHUNK + 3 + count, 40)
    score = numbers.random(len(sides)).astype(np.float32)
    index = bare_index(sides, sides, s=score)
    index.sources = (range(SAMPLES_PER_CHUNK + 3), range(SAMPLES_PER_CHUNK + 3, len(sides)))
    sources = tuple(DataSource(name=name, shards=(name,), share=1) for name in ("a", "b"))
    rules = (DataFilter(column="s", max=0.25, source="b"), DataFilter(column="s", min=0.5, source="a"))
    data = make_config(shards=(), sources=sources, filters=rules, global_batch=1000).data
    plan = Plan(0, index, data)
    for step in range(4):
        batch = plan.batch(step)
        is_b = batch.source == 1
        assert (score[batch.samples[is_b]] <= 0.25).all() and (batch.samples[is_b] >= SAMPLES_PER_CHUNK + 3).all()
        assert (score[batch.samples[~is_b]] >= 0.5).all() and (batch.samples[~is_b] < SAMPLES_PER_CHUNK + 3).all()
    assert plan.filter_counts()["b"][0].num_kept == np.count_nonzero(score[SAMPLES_PER_CHUNK + 3 :] <= 0.25)
    hashes = {Plan(0, index, dataclasses.replace(data, filters=some)).hash for some in (rules, rules[:1], ())}
    assert len(hashes) == 3


def test_filters_that_leave_nothing_are_refused(make_config) -> None:
    sides = np.full(20, 40)
    data = make_config(shards=("x",), filters=(DataFilter(column="pixels", min=1e9),)).data
    with pytest.raises(DataError, match="none of the 20 images .* passes data.filters.*widen the filters"):
        Plan(0, bare_index(sides, sides), data)
