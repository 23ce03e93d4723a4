"""The index: what it holds, that it is built once, and what its hash covers."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data import index as index_module
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index import build_index, default_index_dir, open_index
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import encode_image, sample_members, write_tar


def test_holds_every_sample(data_set: list[str], tmp_path: Path) -> None:
    index = build_index(data_set, tmp_path)
    assert len(index) == 21
    assert [entry.num_samples for entry in index.shards] == [7, 5, 9]
    for sample in range(len(index)):
        with open(index.shard_path(sample), "rb") as file:
            file.seek(int(index.image_offset[sample]))
            picture = Image.open(io.BytesIO(file.read(int(index.image_bytes[sample]))))
        assert (picture.height, picture.width) == index.size_px(sample)
        assert index.name(sample) == f"{sample:09d}"
        assert index.caption(sample) == ("red circle " * (sample % 7 + 1)).strip()
    assert index.faults() == {}


def test_is_built_once_and_only_changed_shards_are_read(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    shards = [shutil.copy2(path, tmp_path) for path in data_set]
    scanned = []
    scan = index_module.scan_shard
    monkeypatch.setattr(index_module, "scan_shard", lambda path: scanned.append(path) or scan(path))
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


def test_hash_is_of_the_data_not_of_their_place(data_set: list[str], tmp_path: Path) -> None:
    here = [shutil.copy2(path, tmp_path) for path in data_set]
    index = build_index(here, default_index_dir(here))
    assert build_index(data_set, tmp_path / "elsewhere").hash == index.hash
    assert build_index(data_set[::-1], tmp_path / "elsewhere").hash != index.hash
    (tmp_path / "moved").mkdir()
    for path in [*here, default_index_dir(here)]:
        shutil.move(path, tmp_path / "moved")
    moved = open_index(tmp_path / "moved" / ".bitdance_index")
    assert moved.shard_path(0) == str(tmp_path / "moved" / "00000.tar")


def test_hash_covers_captions_and_sizes(tmp_path: Path) -> None:
    """Three tars of equal length that differ in nothing but a caption, or a size, of equal length."""
    base = sample_members(20, 30, "red")
    changed = [base, base | {"txt": b"tan"}, base | {"json": base["json"].replace(b"30", b"31")}]
    hashes = set()
    for number, members in enumerate(changed):
        shard = write_tar(tmp_path / f"{number}.tar", {"0": members})
        hashes.add(build_index([str(shard)], tmp_path / f"index_{number}").hash)
    assert len({path.stat().st_size for path in tmp_path.glob("*.tar")}) == 1
    assert len(hashes) == 3


def test_equal_file_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    shards = [
        str(write_tar(tmp_path / name / "00000.tar", {"0": sample_members(16, 16 + size, name)}))
        for size, name in enumerate(("a", "b"))
    ]
    index = build_index(shards, tmp_path / "index")
    assert [index.caption(sample) for sample in range(2)] == ["a", "b"]
    assert [index.shard_path(sample) for sample in range(2)] == shards


def test_captions_sizes_and_faults(tmp_path: Path) -> None:
    jpg = encode_image(20, 30)
    record = json.dumps({"caption": "from json", "width": 30, "height": 20}).encode()
    samples = {
        "text": {"jpg": jpg, "txt": b" a cat \n", "json": record},
        "json": {"jpg": jpg, "json": record},
        "empty": {"jpg": jpg, "txt": b" \n", "json": record},
        "missing": {"png": encode_image(20, 30, kind="PNG")},
        "latin1": {"webp": encode_image(20, 30, kind="WEBP"), "txt": b"caf\xe9"},
        "surrogate": {"jpg": jpg, "json": b'{"caption": "\\ud800"}'},
        "number": {"jpg": jpg, "json": b'{"caption": 5, "width": true, "height": -2}'},
        "broken_json": {"jpg": jpg, "txt": b"fine", "json": b"{"},
        "dots": {"JPG": jpg, "syn.json": b'{"caption": "other"}', "json": record},
        "no_image": {"txt": b"alone"},
        "no_size": {"jpg": b"not an image", "txt": b"text"},
        "unused": {"cls": b"1"},
        "__meta__/0": {"jpg": jpg},
    }
    shard = str(write_tar(tmp_path / "0.tar", samples))
    index = build_index([shard], tmp_path / "index")
    found = {index.name(i): (index.caption(i), CaptionStatus(index.caption_status[i]).name) for i in range(len(index))}
    assert found == {
        "text": ("a cat", "USABLE"),
        "json": ("from json", "USABLE"),
        "empty": ("", "EMPTY"),
        "missing": ("", "MISSING"),
        "latin1": ("", "INVALID"),
        "surrogate": ("", "INVALID"),
        "number": ("", "INVALID"),
        "broken_json": ("fine", "USABLE"),
        "dots": ("from json", "USABLE"),
    }
    assert {index.size_px(sample) for sample in range(len(index))} == {(20, 30)}
    assert index.faults() == {
        "missing_image": {shard: 2},
        "unreadable_size": {shard: 1},
        "invalid_json": {shard: 1},
    }


def test_repeated_member_counts_and_the_first_stays(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"0": {"jpg": encode_image(20, 30), "txt": b"first", "TXT": b"second"}})
    index = build_index([str(path)], tmp_path / "index")
    assert (index.caption(0), index.faults()) == ("first", {"duplicate_member": {str(path): 1}})


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
    with pytest.raises(DataError, match="format 99, this version reads 1"):
        open_index(tmp_path / "index")


def test_a_failed_build_leaves_the_old_index(data_set: list[str], tmp_path: Path) -> None:
    old = build_index(data_set[:1], tmp_path / "index")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(data_set[1]).read_bytes()[:5000])
    with pytest.raises(DataError, match="cut.tar: byte"):
        build_index([data_set[0], str(cut)], tmp_path / "index")
    assert open_index(tmp_path / "index").hash == old.hash
    assert not list((tmp_path / "index").glob(".building*"))
