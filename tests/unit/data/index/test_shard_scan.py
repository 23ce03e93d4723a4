"""Scanning a shard: which members make up a sample, its size, its scores, and what is counted as wrong."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import base_plus_ext

from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.report import check_skipped
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import encode_image, write_tar


def test_keys_of_another_encoding_are_named_with_escapes(tmp_path: Path) -> None:
    """Messages name them, and are stored as UTF-8."""
    samples = {"caf\udce9": {"jpg": encode_image(20, 30)}, "größe": {"jpg": encode_image(20, 30)}}
    index = build_index([str(write_tar(tmp_path / "0.tar", samples))], tmp_path / "index")
    assert [index.name(sample) for sample in range(2)] == ["caf\\xe9", "größe"]


def test_captions_sizes_and_errors(tmp_path: Path) -> None:
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
    assert index.errors() == {
        "missing_image": {shard: 2},
        "unreadable_size": {shard: 1},
        "invalid_json": {shard: 1},
    }


def test_repeated_member_counts_and_the_first_stays(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"0": {"jpg": encode_image(20, 30), "txt": b"first", "TXT": b"second"}})
    index = build_index([str(path)], tmp_path / "index")
    assert (index.caption(0), index.errors()) == ("first", {"duplicate_member": {str(path): 1}})


def test_two_jpegs_are_no_sample(tmp_path: Path) -> None:
    jpg = encode_image(20, 30)
    samples = {"0": {"jpg": jpg, "jpeg": jpg, "cls": b"1"}, "1": {"jpg": jpg, "png": encode_image(20, 30, kind="PNG")}}
    path = str(write_tar(tmp_path / "0.tar", samples))
    index = build_index([path], tmp_path / "index")
    assert [index.name(i) for i in range(len(index))] == ["1"] and index.errors() == {"two_images": {path: 1}}
    with pytest.raises(DataError, match="two_images"):
        check_skipped(index, 0.1)


def test_names_split_as_in_webdataset(tmp_path: Path) -> None:
    jpg = encode_image(16, 16)
    names = ["0.jpg", "1.a.jpg", "x.y/2.JPG", "x.y/3", "x/y/4.jpg", "__meta__/5.jpg", "__6__.jpg"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(jpg)
            tar.addfile(info, io.BytesIO(jpg))
    index = build_index([str(tmp_path / "0.tar")], tmp_path / "index")
    parts = [base_plus_ext(name) for name in names if not name.startswith("__meta__")]
    assert [index.name(i) for i in range(len(index))] == [key for key, ext in parts if key and ext.lower() == "jpg"]


def test_scores(tmp_path: Path) -> None:
    """Numbers of records, in shards with different fields; Python writes NaN for a missing number."""
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
    assert index.original_sizes_px(slice(None)).tolist() == [[48, 64]] * 3
    assert index.errors() == {}


def test_scores_of_records_with_different_fields(tmp_path: Path) -> None:
    """Some fields are missing, in another order, or hold text where other records hold numbers."""
    records = [{"a": 1.5, "b": 2}, {"b": 3, "a": 2.5}, {"a": "none", "c": 1}, {}, {"a": 10**400, "b": True}]
    samples = {
        str(n): {"jpg": encode_image(40, 60), "json": json.dumps(record | {"width": 60, "height": 40}).encode()}
        for n, record in enumerate(records)
    }
    index = build_index([str(write_tar(tmp_path / "0.tar", samples))], tmp_path / "index")
    nan = np.nan
    np.testing.assert_array_equal(index.score("a"), np.array([1.5, 2.5, nan, nan, nan], np.float32))
    np.testing.assert_array_equal(index.score("b"), np.array([2, 3, nan, nan, 1], np.float32))
    np.testing.assert_array_equal(index.score("c"), np.array([nan, nan, 1, nan, nan], np.float32))
