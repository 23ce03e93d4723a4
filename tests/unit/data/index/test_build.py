"""Building the index: only what is new or has changed, in parallel, and resumable."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.data.index import build
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import open_index
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import write_tar


def test_is_built_once_and_only_changed_shards_are_read(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    shards = [shutil.copy2(path, tmp_path) for path in data_set]
    scanned = []
    scan = build.scan_file
    monkeypatch.setattr(build, "scan_file", lambda task, **rest: scanned.append(task.path) or scan(task, **rest))
    first = build_index(shards[:2], tmp_path / "index")
    assert scanned == shards[:2]
    assert build_index(shards[:2], tmp_path / "index").hash == first.hash
    assert scanned == shards[:2]
    grown = build_index(shards, tmp_path / "index")
    assert scanned == shards
    fresh = build_index(shards, tmp_path / "other")
    assert grown.hash == fresh.hash != first.hash
    for name, column in fresh.columns.items():
        np.testing.assert_array_equal(grown.columns[name], column)
    os.utime(shards[1], ns=(1, 1))
    scanned.clear()
    assert build_index(shards, tmp_path / "index").hash == fresh.hash
    assert scanned == [shards[1]]


def test_refusals(data_set: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.tar: cannot open the shard"):
        build_index([*data_set, str(tmp_path / "gone.tar")], tmp_path / "index")
    empty = str(write_tar(tmp_path / "text_only.tar", {"0": {"txt": b"a"}}))
    with pytest.raises(DataError, match="no usable image in 1 shards.*missing_image"):
        build_index([empty], tmp_path / "index")
    with pytest.raises(DataError, match="no usable index.*Delete"):
        open_index(tmp_path / "index")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the index.*Set data.index_dir"):
        build_index(data_set, tmp_path / "file")
    build_index(data_set, tmp_path / "index")
    next((tmp_path / "index").glob("columns_*/shard.npy")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="no usable index.*Delete"):
        open_index(tmp_path / "index")
    table = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(table | {"format": 99}))
    with pytest.raises(DataError, match="format 99, this version reads 2"):
        open_index(tmp_path / "index")


def test_a_failed_build_leaves_the_old_index(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    old = build_index(data_set[:1], tmp_path / "index")
    monkeypatch.setattr(build, "_write_columns", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(DataError, match="no space left"):
        build_index(data_set, tmp_path / "index")
    assert open_index(tmp_path / "index").hash == old.hash
    assert not list((tmp_path / "index").glob(".building*"))


def test_a_stopped_build_goes_on_where_it_was(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    """What was scanned before the stop is kept and not scanned again."""
    scanned = []
    scan = build.scan_file

    def scan_two(task, captions, stores):
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(task.path)
        return scan(task, captions, stores)

    monkeypatch.setattr(build, "scan_file", scan_two)
    with pytest.raises(KeyboardInterrupt):
        build_index(data_set, tmp_path / "index")
    scanned.clear()
    index = build_index(data_set, tmp_path / "index")
    assert scanned == data_set[2:]
    monkeypatch.undo()
    whole = build_index(data_set, tmp_path / "whole")
    assert index.hash == whole.hash and index.digests == whole.digests
    assert not list((tmp_path / "index" / ".parts").glob("*"))


def test_processes_build_the_same(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    alone = build_index(data_set, tmp_path / "alone")
    monkeypatch.setattr(build, "_PART_SAMPLES", 1)
    seen = []
    index = build_index(data_set, tmp_path / "index", num_workers=2, progress=lambda entry: seen.append(entry.path))
    assert sorted(seen) == sorted(data_set)
    assert index.hash == alone.hash and index.digests == alone.digests
    for name, column in alone.columns.items():
        np.testing.assert_array_equal(index.columns[name], column)


def test_an_index_that_cannot_be_read_is_built_again(data_set: list[str], tmp_path: Path, caplog) -> None:
    whole = build_index(data_set, tmp_path / "index")
    table_path = tmp_path / "index" / "index.json"
    table = json.loads(table_path.read_text())
    for content in (json.dumps(table | {"format": 1}), "{"):
        table_path.write_text(content)
        assert build_index(data_set, tmp_path / "index").hash == whole.hash
    assert "format 1, this version reads 2" in caplog.text and "Building it again" in caplog.text
