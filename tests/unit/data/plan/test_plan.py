"""The plan: a pure function, exact mixes, every sample once an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import bare_index


@pytest.fixture
def index(data_set: list[str], tmp_path: Path) -> Index:
    return build_index(data_set, tmp_path / "index")


def synthetic_index(num_samples: int, seed: int = 0) -> Index:
    """Columns as of a scan, without shards; sides of 10 .. 70 px."""
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(10, 70, (2, num_samples)).astype(np.int32)
    status = (numbers.random(num_samples) < 0.05).astype(np.uint8)
    return bare_index(*sizes, status=status)


def test_batches_have_the_exact_mix_and_fitting_buckets(index: Index, make_config) -> None:
    plan = Plan(3, index, make_config().data)
    for step in range(30):
        batch = plan.batch(step)
        assert len(batch) == 10
        assert Counter(batch.side_px.tolist()) == {16: 6, 32: 4} == plan.images_by_resolution(step)
        for sample, side, bucket in zip(batch.samples.tolist(), batch.side_px, batch.bucket_px.tolist(), strict=True):
            height, width = index.size_px(sample)
            assert height >= bucket[0] and width >= bucket[1]
            assert tuple(bucket) in {16: {(16, 16), (24, 8), (8, 24)}, 32: {(32, 32)}}[side]


def test_every_eligible_sample_once_an_epoch_of_its_resolution(index: Index, make_config) -> None:
    plan = Plan(3, index, make_config().data)
    sides = index.sizes_px(slice(None)).min(axis=1)
    eligible = {16: set(range(21)), 32: set(np.flatnonzero(sides >= 32).tolist())}
    assert plan.num_eligible == {16: 21, 32: len(eligible[32])} and 5 < len(eligible[32]) < 21
    streams: dict[int, list[int]] = {16: [], 32: []}
    epochs: dict[int, list[int]] = {16: [], 32: []}
    for step in range(50):
        batch = plan.batch(step)
        for side in (16, 32):
            streams[side] += batch.samples[batch.side_px == side].tolist()
            epochs[side] += batch.epoch[batch.side_px == side].tolist()
    for side, stream in streams.items():
        size = len(eligible[side])
        rounds = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        assert len(rounds) > 5
        assert all(sorted(one) == sorted(eligible[side]) for one in rounds)
        assert rounds[0] != rounds[1]
        assert epochs[side] == [number // size for number in range(len(stream))]


def test_is_a_pure_function_of_seed_index_and_step(index: Index, make_config) -> None:
    plan, again, other = (Plan(seed, index, make_config().data) for seed in (3, 3, 4))
    far = plan.batch(123_456)
    plan.batch(0)
    for name, values in vars(again.batch(123_456)).items():
        np.testing.assert_array_equal(values, getattr(far, name))
    assert not np.array_equal(other.batch(0).samples, plan.batch(0).samples)
    assert plan.hash == again.hash != other.hash
    assert Plan(3, index, make_config(global_batch=20).data).hash != plan.hash


def test_draws_have_their_shares_and_spare_samples_without_caption(make_config) -> None:
    index = synthetic_index(20_000)
    data = make_config(global_batch=5000, text_drop=0.1, image_to_text_share=0.2).data
    batch = Plan(0, index, data).batch(0)
    has_caption = index.status("caption", batch.samples) == 0
    assert batch.is_caption_dropped[~has_caption].all() and (~has_caption).sum() > 100
    assert not (batch.is_image_to_text & batch.is_caption_dropped).any()
    # Of about 4750 with a caption; five standard deviations are 0.029 and 0.020.
    assert abs(batch.is_image_to_text[has_caption].mean() - 0.2) < 0.029
    assert abs(batch.is_caption_dropped[has_caption].mean() - 0.1 * 0.8) < 0.020


def test_draws_are_of_the_sample_and_its_epoch_not_of_its_place(make_config) -> None:
    """The same samples in batches of another size, at other places, draw the same."""
    index = synthetic_index(300)
    draws = []
    for size in (50, 100):
        plan = Plan(0, index, make_config(global_batch=size, image_to_text_share=0.3, text_drop=0.3).data)
        seen = {}
        for step in range(1000 // size):
            b = plan.batch(step)
            keys = zip(b.samples.tolist(), b.side_px.tolist(), b.epoch.tolist(), strict=True)
            seen |= dict(zip(keys, zip(b.is_caption_dropped, b.is_image_to_text, strict=True), strict=True))
        draws.append(seen)
    assert draws[0] == draws[1]
    by_epoch = [{k[:2]: v for k, v in draws[0].items() if k[2] == epoch} for epoch in (0, 1)]
    assert any(by_epoch[0][key] != by_epoch[1][key] for key in by_epoch[1])


def test_a_resolution_without_samples_is_refused_and_one_without_share_is_not(index: Index, make_config) -> None:
    huge = Resolution(side_px=512, share=1, buckets_px=((512, 512),))
    with pytest.raises(DataError, match="none of the 21 images fills a bucket of resolution 512 px with data.max_up"):
        Plan(0, index, make_config(resolutions=(huge,)).data)
    unused = Resolution(side_px=512, share=0, buckets_px=((512, 512),))
    kept = make_config().data.resolutions
    batch = Plan(0, index, make_config(resolutions=(unused, *kept)).data).batch(0)
    assert set(batch.side_px.tolist()) == {16, 32}
