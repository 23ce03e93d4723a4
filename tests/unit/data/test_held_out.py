"""Held-out images: which, at what size, and the same batches for any number of ranks."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data.held_out import HeldOutImages, HeldOutSize, centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.errors import DataError

SIZES = [(40, 37), (24, 64), (40, 37), (9, 50), (32, 32), (40, 37)]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def index(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            content = io.BytesIO()
            Image.fromarray(picture).save(content, format="PNG")
            for suffix, data in (("png", content.getvalue()), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return build_index([str(folder / "00000.tar")], folder / "index")


def by_sample(images, num_ranks):
    return {
        sample: image
        for rank in range(num_ranks)
        for batch in images.batches(rank, num_ranks)
        for sample, image in zip(batch.samples, batch.images, strict=True)
    }


def test_original_images_are_not_scaled_but_cut(index, pictures):
    images = HeldOutImages(index, HeldOutSize(None, 8, 16), None, batch_px=3000)
    assert images.samples.tolist() == [0, 1, 2, 4, 5] and images.left_out.tolist() == [3]
    found = by_sample(images, 1)
    assert [*sorted(found)] == images.samples.tolist()
    assert np.array_equal(found[0], pictures[0][:, 2:34])
    assert np.array_equal(found[1], pictures[1])
    shapes = [batch.images.shape for batch in images.batches(0, 1)]
    assert shapes == [(1, 24, 64, 3), (1, 32, 32, 3), (2, 40, 32, 3), (1, 40, 32, 3)]
    for num_ranks in (2, 3):
        assert all(np.array_equal(found[sample], image) for sample, image in by_sample(images, num_ranks).items())


def test_crops_are_of_the_images_that_cover_them(index, pictures):
    images = HeldOutImages(index, HeldOutSize((32, 32), 8, 16), 3, batch_px=1 << 18)
    assert images.samples.tolist() == [0, 2, 4]
    # Only those before the last one that was taken count as left out.
    assert images.left_out.tolist() == [1, 3]
    (batch,) = images.batches(0, 1)
    assert np.array_equal(batch.images, centre_crops(index, (32, 32), 3))
    # The only one that is as large as the crop is not scaled.
    assert np.array_equal(batch.images[2], pictures[4])
    assert np.array_equal(centre_crops(index, (24, 64), 9), pictures[1][None])


def test_no_image_fits(index):
    message = "none of 6 images covers a crop of 64 x 64 px; the largest sides are 40 x 64 px"
    with pytest.raises(DataError, match=message):
        HeldOutImages(index, HeldOutSize((64, 64), 8, 16), None, 1)
    with pytest.raises(DataError, match="none of 6 images has sides of 48 px"):
        HeldOutImages(index, HeldOutSize(None, 16, 48), None, 1)
