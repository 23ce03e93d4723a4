"""Photographs of installed packages, cut into tiles and packed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import photograph_shards
import pytest
from photograph_shards import HELD_OUT, SKIMAGE, TRAINED, read_photograph, tiles, write_photographs
from PIL import Image

from bitdance_scale.data.shard_writing.tar_writer import read_samples
from bitdance_scale.errors import DataError


def test_tiles_are_disjoint_and_centred() -> None:
    # Each pixel holds its own position, so that tiles show where they were cut.
    rows, columns = np.mgrid[:70, :101].astype(np.uint8)
    photograph = np.stack([rows, columns, rows], axis=-1)
    found = list(tiles(photograph, 32))
    corners = [tuple(tile[0, 0, :2]) for tile in found]
    assert corners == [(3, 2), (3, 34), (3, 66), (35, 2), (35, 34), (35, 66)]
    assert all(tile.shape == (32, 32, 3) for tile in found)


def test_even_tiles_are_left_out() -> None:
    photograph = np.zeros((32, 64, 3), dtype=np.uint8)
    photograph[:16, 32:] = 200
    (tile,) = tiles(photograph, 32)
    assert np.array_equal(tile, photograph[:, 32:])


def test_no_photograph_is_trained_on_and_held_out() -> None:
    assert not set(TRAINED) & set(HELD_OUT)


def test_shards_hold_the_pixels_and_are_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photograph_shards, "TRAINED", {"coins.png": SKIMAGE})
    monkeypatch.setattr(photograph_shards, "HELD_OUT", {"chelsea.png": SKIMAGE})
    counts = write_photographs(tmp_path / "first", 96)
    assert counts == write_photographs(tmp_path / "second", 96) == {"train": 12, "held_out": 12}
    for part in counts:
        shard = Path(part) / "00000.tar"
        assert (tmp_path / "first" / shard).read_bytes() == (tmp_path / "second" / shard).read_bytes()
    wanted = list(tiles(read_photograph("chelsea.png", SKIMAGE), 96))
    packed = [members["png"] for _, members in read_samples(tmp_path / "first" / "held_out" / "00000.tar")]
    for tile, content in zip(wanted, packed, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), tile)


@pytest.mark.parametrize("place", ["no_such_package/data", SKIMAGE])
def test_missing_photographs_are_named(place: str) -> None:
    with pytest.raises(DataError, match=r"(no_such_package: not installed, and |skimage.*)no_such_picture\.png"):
        read_photograph("no_such_picture.png", place)
