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


def damaged_index(folder: Path, num_good: int, num_bad: int) -> Index:
    """One shard of 32 px images, of which the first can be read and the others cannot."""
    samples = {}
    for number in range(num_good + num_bad):
        samples[f"{number}"] = sample_members(32, 32, "a", number)
        if number >= num_good:
            samples[f"{number}"]["jpg"] = samples[f"{number}"]["jpg"][:200]
    return build_index([str(write_tar(folder / "0.tar", samples))], folder)


def test_another_image_takes_the_place_of_an_unreadable_one(tmp_path: Path):
    settings = {"sizes_px": ((32, 32),), "images_px": 4096, "num_steps": 6}
    index = damaged_index(tmp_path, num_good=4, num_bad=2)
    whole = batches(index, **settings)
    good = centre_crops(damaged_index(tmp_path / "good", num_good=4, num_bad=0), (32, 32), 4)
    assert [len(batch) for batch in whole] == [4] * 6
    # Crops of 32 px images are the images themselves.
    assert all((image == good).all(axis=(1, 2, 3)).any() for batch in whole for image in batch)
    # One image per rank and step.
    for rank in range(4):
        part = batches(index, rank, 4, **settings)
        assert all(np.array_equal(images, batch[rank:][:1]) for images, batch in zip(part, whole, strict=True))
    resumed = batches(index, first_step=4, **settings)
    assert len(resumed) == 2 and all(np.array_equal(*pair) for pair in zip(resumed, whole[4:], strict=True))


def test_unreadable_images_are_counted_by_draw(tmp_path: Path):
    index = damaged_index(tmp_path, num_good=4, num_bad=2)
    with CropStream(
        index, sizes_px=((32, 32),), images_px=4096, max_zoom=1.0, seed=7, rank=0, num_ranks=1, num_steps=6,
        num_threads=2, max_skipped_share=0.0,
    ) as stream:  # fmt: skip
        for _ in stream:
            assert len(stream.samples) == len(stream.slots) == 4 and max(stream.samples) < 4
    num_read, num_skipped = stream.error_counter.totals
    # Four epochs of 6 images, 2 of them bad: 8 at least.
    assert num_read == 24 + num_skipped and 8 <= num_skipped < 24


def test_a_place_without_any_readable_image_stops_the_stream(tmp_path: Path):
    all_bad = damaged_index(tmp_path, num_good=0, num_bad=1)
    with pytest.raises(DataError, match=r"nor can 64 others in its place: 65 of 65 samples were skipped; bad_image 65"):
        batches(all_bad, sizes_px=((32, 32),), images_px=1024)
    with pytest.raises(DataError, match=r"0\.tar: sample 0: bad_image"):
        centre_crops(all_bad, (32, 32), 1)
