"""Images of folders and .npz files, and files that are not such."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.distributions import image_sets
from bitdance_scale.evaluation.distributions.image_sets import FolderImages, NpzImages, open_images


def noise(number: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_in_batches(tmp_path, save, monkeypatch):
    images = noise(7)
    save(tmp_path / "a.npz", images, np.arange(7))
    read = []
    plain = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: read.append(n) or plain(file, n))
    opened = open_images(tmp_path / "a.npz", batch_images=3)
    assert opened.file == (7, (6, 9))
    batches = list(opened)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), images)
    assert max(read) == 3 * 6 * 9 * 3 and min(read) >= 0


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"arr_0": noise(2) / 255}, r"arr_0 is float64 \[2, 6, 9, 3\], expected uint8"),
        ({"arr_0": noise(2)[..., 0]}, r"arr_0 is uint8 \[2, 6, 9\], expected"),
        ({"arr_0": noise(2).transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \[2, 3, 6, 9\], expected"),
        ({"arr_0": np.asfortranarray(noise(2))}, r"arr_0.npy is in Fortran order; save numpy.ascontiguousarray"),
        ({"arr_0": noise(2)[:0]}, r"arr_0 is uint8 \[0, 6, 9, 3\]"),
        ({"images": noise(2)}, r"has no arr_0"),
        ({"arr_0": np.array([noise(1), None], dtype=object)}, r"arr_0.npy holds Python objects"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, problem):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=rf"a.npz: {problem}"):
        NpzImages(tmp_path / "a.npz")


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, noise(4))
    content = bytearray(path.read_bytes())
    content[400] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.npz: is no readable .npz \(BadZipFile: Bad CRC-32"):
        list(NpzImages(path, 3))
    path.write_bytes(content[:300])
    with pytest.raises(DataError, match=r"a.npz: is no readable .npz \(BadZipFile: File is not a zip file"):
        NpzImages(path)
    np.save(tmp_path / "array.npy", noise(4))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "array.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"arr_0.npy has 775 bytes and its header says 776"):
        NpzImages(path)
    with pytest.raises(DataError, match=r"missing.npz: is no readable .npz \(FileNotFoundError"):
        NpzImages(tmp_path / "missing.npz")


def test_folder_in_the_order_of_names(tmp_path):
    images = noise(5)
    for place, image in enumerate(images):
        path = tmp_path / f"{place // 2}" / f"{place:03d}.PNG"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "prompts.json").write_text("{}", encoding="utf-8")
    opened = open_images(tmp_path, batch_images=2)
    assert opened.file == (5, (6, 9))
    assert [len(batch) for batch in opened] == [2, 2, 1]
    assert np.array_equal(np.concatenate(list(opened)), images)


@pytest.mark.parametrize(
    ("odd", "problem"),
    [
        (Image.new("RGBA", (9, 6)), r"b.png is transparent \(mode RGBA\): images that are compared are RGB of 8 bits"),
        (Image.new("L", (9, 6)), r"b.png is grey \(mode L\): images"),
        (Image.new("I;16", (9, 6)), r"b.png is grey \(mode I;16\): images"),
        (Image.new("P", (9, 6)), r"b.png is of mode P: images"),
        (Image.new("RGB", (6, 9)), r"images are of 2 sizes \(1 of 9 x 6 px such as a.png; 1 of 6 x 9 px such as b.png"),
    ],
)
def test_other_images_are_refused_before_any_is_decoded(tmp_path, odd, problem, monkeypatch):
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.png")
    odd.save(tmp_path / "b.png")
    monkeypatch.setattr(image_sets, "_decode", None)
    with pytest.raises(DataError, match=problem):
        FolderImages(tmp_path)


def test_folders_without_images_and_damaged_ones(tmp_path):
    with pytest.raises(DataError, match=r"holds no image; expected files that end in .png"):
        FolderImages(tmp_path)
    with pytest.raises(DataError, match=r"there is no such folder of images"):
        FolderImages(tmp_path / "missing")
    Image.fromarray(noise(1, 60, 60)[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with pytest.raises(DataError, match=r"a.png: cannot be decoded"):
        list(FolderImages(tmp_path))
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"a.png: is no readable image"):
        FolderImages(tmp_path)
