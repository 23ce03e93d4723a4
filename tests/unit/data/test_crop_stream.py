"""Crops for the visual tokenizer: reproducible, the same for any number of ranks, and strict about bad images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.data.crop_stream import CropStream, large_enough
from bitdance_scale.data.held_out import centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import sample_members, write_tar

SIZES = ((16, 16), (32, 16), (32, 32))


@pytest.fixture
def index(data_set: list[str], tmp_path: Path) -> Index:
    return build_index(data_set, tmp_path / "index")


def batches(index: Index, rank: int = 0, num_ranks: int = 1, **changes: object) -> list[np.ndarray]:
    settings = {
        "sizes_px": SIZES, "images_px": 4096, "max_zoom": 1.25, "seed": 7, "num_steps": 6, "num_threads": 2,
        "max_skipped_share": 0.0,
    } | changes  # fmt: skip
    with CropStream(index, rank=rank, num_ranks=num_ranks, **settings) as stream:
        return list(stream)


def test_every_step_has_one_size_and_the_same_number_of_pixels(index: Index):
    shapes = [batch.shape for batch in batches(index, num_steps=20)]
    assert {shape[1:3] for shape in shapes} == set(SIZES)
    assert all(n * height * width == 4096 and channels == 3 for n, height, width, channels in shapes)


def test_ranks_share_out_the_same_steps(index: Index):
    whole = batches(index)
    for num_ranks in (2, 4):
        parts = [batches(index, rank, num_ranks) for rank in range(num_ranks)]
        for step, batch in enumerate(whole):
            merged = np.empty_like(batch)
            for rank in range(num_ranks):
                merged[rank::num_ranks] = parts[rank][step]
            np.testing.assert_array_equal(merged, batch)


def test_another_seed_gives_other_crops(index: Index):
    first, second = batches(index, sizes_px=((16, 16),)), batches(index, sizes_px=((16, 16),), seed=8)
    assert not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[0], batches(index, sizes_px=((16, 16),))[0])


def test_an_epoch_shows_every_large_image_once(index: Index):
    num_images = len(large_enough(index, (32, 32)))
    # Without zoom, only the offset of the crop of an image varies. One step is one image.
    batch = np.concatenate(batches(index, sizes_px=((32, 32),), images_px=1024, num_steps=num_images, max_zoom=1.0))
    whole = centre_crops(index, (32, 32), num_images)
    distance = np.abs(batch[:, None].astype(int) - whole[None].astype(int)).mean(axis=(2, 3, 4))
    assert sorted(distance.argmin(axis=1).tolist()) == list(range(num_images))


def test_images_are_never_enlarged(index: Index):
    for size in SIZES:
        samples = large_enough(index, size)
        assert all(h >= size[0] and w >= size[1] for h, w in map(index.size_px, samples.tolist()))
    with pytest.raises(DataError, match=r"none of 21 images covers a crop of 512 x 512 px"):
        batches(index, sizes_px=((512, 512),), images_px=512 * 512)


def test_unreadable_images_are_left_out_and_stop_the_stream_when_nothing_is_left(tmp_path: Path):
    good, bad = sample_members(32, 32, "a", 1), sample_members(32, 32, "b", 2)
    bad["jpg"] = bad["jpg"][:200]
    one_bad = build_index([str(write_tar(tmp_path / "a" / "0.tar", {"1": good, "2": bad}))], tmp_path / "a")
    steps = batches(one_bad, sizes_px=((32, 32),), images_px=2048, num_steps=3, max_skipped_share=0.9)
    assert [len(batch) for batch in steps] == [1, 1, 1]
    all_bad = build_index([str(write_tar(tmp_path / "b" / "0.tar", {"1": bad}))], tmp_path / "b")
    with pytest.raises(DataError, match=r"no image of a step could be read.*bad_image"):
        batches(all_bad, sizes_px=((32, 32),), images_px=1024)
    with pytest.raises(DataError, match=r"0\.tar: sample 1: bad_image"):
        centre_crops(all_bad, (32, 32), 1)
