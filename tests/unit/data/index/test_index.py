"""The index: what it holds, that it is built once, and what its hash covers."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import base_plus_ext

from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index import build
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import default_index_dir, open_index
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
    """Three tars of equal length that differ in nothing but a caption, or a size, of equal length: digests tell."""
    base = sample_members(20, 30, "red")
    changed = [base, base | {"txt": b"tan"}, base | {"json": base["json"].replace(b"30", b"31")}]
    hashes = []
    for number, members in enumerate(changed):
        shard = write_tar(tmp_path / f"{number}.tar", {"0": members})
        index = build_index([str(shard)], tmp_path / f"index_{number}")
        hashes.append((index.hash, index.digests["caption"]))
    assert len({path.stat().st_size for path in tmp_path.glob("*.tar")}) == 1
    (base, caption), same, other = hashes
    assert same[0] == base != other[0] and same[1] != caption


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
    found = {
        index.name(i): (index.caption(i), CaptionStatus(index.status("caption")[i]).name) for i in range(len(index))
    }
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
    """What was scanned before a shard could not be read is kept, and read from there."""
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


def test_names_split_as_in_webdataset(tmp_path: Path) -> None:
    jpg = encode_image(16, 16)
    names = ["0.jpg", "1.a.jpg", "x.y/2.JPG", "x.y/3", "x/y/4.jpg", "__meta__/5.jpg"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(jpg)
            tar.addfile(info, io.BytesIO(jpg))
    index = build_index([str(tmp_path / "0.tar")], tmp_path / "index")
    parts = [base_plus_ext(name) for name in names if not name.startswith("__")]
    assert [index.name(i) for i in range(len(index))] == [key for key, ext in parts if key and ext.lower() == "jpg"]


def test_an_index_that_cannot_be_read_is_built_anew(data_set: list[str], tmp_path: Path, caplog) -> None:
    whole = build_index(data_set, tmp_path / "index")
    table_path = tmp_path / "index" / "index.json"
    table = json.loads(table_path.read_text())
    for content in (json.dumps(table | {"format": 1}), "{"):
        table_path.write_text(content)
        assert build_index(data_set, tmp_path / "index").hash == whole.hash
    assert "format 1, this version reads 2" in caplog.text and "built anew" in caplog.text


def test_caption_sources(tmp_path: Path) -> None:
    record = {"width": 16, "height": 16, "caption": "open", "re_caption": "again"}
    synthetic = {"syn_text": [" one ", "", "two"], "other": 5}
    members = {
        "jpg": encode_image(16, 16),
        "json": json.dumps(record).encode(),
        "syn.json": json.dumps(synthetic).encode(),
    }
    shard = str(write_tar(tmp_path / "0.tar", {"0": members, "1": {**members, "txt": b"text"}}))
    sources = ("json:re_caption", "caption", "syn.json:syn_text", "syn.json:other", "alt.txt")
    index = build_index([shard], tmp_path / "index", captions=sources)
    assert [index.caption(1, source) for source in sources] == ["again", "text", "one", "", ""]
    assert index.alternatives(0, "syn.json:syn_text") == ["one", "two"] and index.caption(0, "caption") == "open"
    assert [CaptionStatus(index.status(s)[0]).name for s in sources] == [
        "USABLE",
        "USABLE",
        "USABLE",
        "INVALID",
        "MISSING",
    ]
    assert index.faults() == {}
    fewer = build_index([shard], tmp_path / "index", captions=sources[1:2])
    # What is there stays: another run may need it.
    assert fewer.captions == sources and fewer.hash == index.hash


def test_scores(tmp_path: Path) -> None:
    """Numbers of the records, in shards that do not have the same ones; NaN is what Python writes for none."""
    jpg, size = encode_image(16, 16), {"width": 16, "height": 16, "original_width": 64, "original_height": 48}
    records = [
        {"punsafe": 0.25, "url": "x"},
        {"punsafe": None, "similarity": 1},
        {"punsafe": float("nan"), "is_ai": True},
    ]
    shards = [
        str(write_tar(tmp_path / f"{n}.tar", {"0": {"jpg": jpg, "json": json.dumps(record | size).encode()}}))
        for n, record in enumerate(records)
    ]
    index = build_index(shards, tmp_path / "index")
    found = {field: [None if np.isnan(v) else float(v) for v in index.score(field)] for field in index.scores}
    assert found == {"punsafe": [0.25, None, None], "similarity": [None, 1, None], "is_ai": [None, None, 1]}
    assert (index.original_height_px.tolist(), index.original_width_px.tolist()) == ([48] * 3, [64] * 3)
    assert index.faults() == {}
