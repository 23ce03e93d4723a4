"""Expansion of data.shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/00000.tar", "a/00002.tar", "a/00000.tar", "a/00001.tar", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(folder: Path, *specs: str) -> list[str]:
    return [os.path.relpath(path, folder) for path in expand_shards([str(folder / spec) for spec in specs])]


@pytest.mark.parametrize("spec", ["a", "a/*.tar", "a/{00000..00002}.tar", "a/0000[0-2].tar"])
def test_folder_glob_and_brace_list(folder: Path, spec: str) -> None:
    assert names(folder, spec) == ["a/00000.tar", "a/00001.tar", "a/00002.tar"]


def test_order_is_that_of_the_specs_and_each_shard_comes_once(folder: Path) -> None:
    assert names(folder, "b", "a/00002.tar", "a") == ["b/00000.tar", "a/00002.tar", "a/00000.tar", "a/00001.tar"]
    assert names(folder, "{b,a}/00000.tar") == ["b/00000.tar", "a/00000.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a/00003.tar", "does not exist"),
        ("a/{00001..00004}.tar", r"shard '.*a/00003.tar' \(from .*does not exist"),
        ("c/*.tar", "matches no file"),
        ("empty", r"holds no \*.tar"),
        ("a/${UNSET_VARIABLE}.tar", "no valid brace list"),
    ],
)
def test_missing_shards(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        names(folder, spec)


@pytest.mark.parametrize(("spec", "place"), [("caf\udce9", ""), ("", "caf\udce9.tar"), ("*", "caf\udce9/0.tar")])
def test_paths_that_are_not_utf8_are_refused(tmp_path: Path, spec: str, place: str) -> None:
    """In folders that are named, and in those that are listed; the index could not store them."""
    path = tmp_path / "data" / spec.replace("*", "") / (place or "0.tar")
    try:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(DataError, match=r"data.shards: /.*/caf\\xe9.*is not UTF-8, in which the index stores paths"):
        expand_shards([str(tmp_path / "data" / spec)])
    link = tmp_path / "link.tar"
    link.symlink_to(path)
    assert expand_shards([str(link)]) == [str(link)]


def test_nothing_and_other_stores_are_refused() -> None:
    with pytest.raises(DataError, match="data.shards is empty"):
        expand_shards([])
    with pytest.raises(DataError, match="only local files and s3://"):
        expand_shards(["gs://bucket/{00000..00001}.tar"])
