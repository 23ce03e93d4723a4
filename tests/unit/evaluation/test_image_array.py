from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.evaluation.image_array import map_npz, read_labels, write_npz


def test_an_archive_is_written_part_by_part(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    write_npz(tmp_path / "a.npz", whole.shape, iter([whole[:3], whole[3:6], whole[6:]]))
    with np.load(tmp_path / "a.npz") as archive:
        assert list(archive) == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], whole)
    with pytest.raises(ValueError, match="6 images, wanted 7"):
        write_npz(tmp_path / "b.npz", whole.shape, iter([whole[:6]]))
    with pytest.raises(ValueError, match="wanted uint8"):
        write_npz(tmp_path / "b.npz", whole.shape, iter([whole[:, :2]]))


def test_labels_are_beside_the_images(tmp_path: Path) -> None:
    """As ADM's sampling script saves them: numpy.savez(FILE, images, labels)."""
    whole = np.random.default_rng(0).integers(0, 256, (4, 4, 6, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 2])
    for name in "ab":
        write_npz(tmp_path / f"{name}.npz", whole.shape, [whole[:3], whole[3:]], labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    np.savez(tmp_path / "adm.npz", whole, labels)
    with np.load(tmp_path / "a.npz") as ours, np.load(tmp_path / "adm.npz") as theirs:
        assert list(ours) == list(theirs) == ["arr_0", "arr_1"]
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
    for name in ("a", "adm"):
        np.testing.assert_array_equal(read_labels(tmp_path / f"{name}.npz"), labels)
        np.testing.assert_array_equal(map_npz(tmp_path / f"{name}.npz"), whole)
    with pytest.raises(ValueError, match=r"labels of float64 \[4\], wanted int64 \[4\]"):
        write_npz(tmp_path / "c.npz", whole.shape, [whole], labels.astype(float))
    np.savez(tmp_path / "none.npz", whole)
    np.savez(tmp_path / "float.npz", whole, labels.astype(float))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:150])
    for name, message in (("none", "has no labels"), ("float", "arr_1 is float64"), ("cut", "is cut short")):
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / f"{name}.npz")


def test_an_archive_is_mapped_wherever_its_array_begins(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    write_npz(tmp_path / "a.npz", whole.shape, iter([whole]))
    np.savez(tmp_path / "b.npz", whole)
    np.savez_compressed(tmp_path / "c.npz", whole)
    for name in "abc":
        found = map_npz(tmp_path / f"{name}.npz")
        assert isinstance(found, np.memmap) == (name != "c")
        np.testing.assert_array_equal(found, whole)


def test_what_is_no_array_of_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "named.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    write_npz(tmp_path / "whole.npz", (2, 4, 4, 3), iter([np.zeros((2, 4, 4, 3), np.uint8)]))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:150])
    for name, message in (("float", "arr_0 is float64"), ("named", "is no .npz with one"), ("cut", "is cut short")):
        with pytest.raises(ValueError, match=message):
            map_npz(tmp_path / f"{name}.npz")
