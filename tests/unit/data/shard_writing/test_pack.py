"""Folders of pictures become shards: what is in them, in which order, in which bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.shard_writing import output_folder, picture_folder
from bitdance_scale.data.shard_writing.pack import PackOptions, cut_shards, is_held_out, pack_source
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.errors import DataError
from tests.unit.data.shard_writing.small_sources import (
    make_folder,
    noise,
    records_of,
    samples_of,
    skipped_of,
    tree_digest,
    write,
)
from tests.unit.data.small_data import encode_image

SMALL = PackOptions(samples_per_shard=5)


def test_pictures_keep_their_bytes_and_find_their_captions(tmp_path):
    source = make_folder(tmp_path / "source")
    report = pack_source(source, tmp_path / "out", SMALL)
    samples = samples_of(tmp_path / "out")
    assert report["num_packed"] == len(samples) == 12
    assert report["shards"] == {"00000.tar": 5, "00001.tar": 5, "00002.tar": 2}
    for key, members in samples.items():
        record = json.loads(members["json"])
        (extension,) = members.keys() - {"txt", "json"}
        path = source / record["original_name"]
        assert path.suffix == f".{extension}"
        assert members[extension] == path.read_bytes()
        assert members["txt"].decode() == path.with_suffix(".txt").read_text(encoding="utf-8") == record["caption"]
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["key"] == key and "." not in key
    names = [json.loads(members["json"])["original_name"] for members in samples.values()]
    assert names == sorted(names)


def test_the_index_reads_what_was_packed(tmp_path):
    pack_source(make_folder(tmp_path / "source"), tmp_path / "out", SMALL)
    shards = expand_shards([str(tmp_path / "out")])
    index = build_index(shards, tmp_path / "index")
    assert sorted(index.sizes_px(slice(0, 12))[:, 0].tolist()) == list(range(40, 52)) and len(index) == 12
    assert not any(count for counts in index.errors().values() for count in counts.values())


def test_headers_are_ustar_without_times_and_owners(tmp_path):
    pack_source(make_folder(tmp_path / "source", 3), tmp_path / "out", SMALL)
    content = (tmp_path / "out" / "00000.tar").read_bytes()
    assert content[257:265] == b"ustar\x0000"
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_workers_and_the_place_of_the_source_change_nothing(tmp_path):
    options = PackOptions(samples_per_shard=3, held_out=0.3)
    pack_source(make_folder(tmp_path / "a", 20), tmp_path / "out_a", options, num_workers=1)
    pack_source(make_folder(tmp_path / "b", 20), tmp_path / "out_b", options, num_workers=4)
    digests = tree_digest(tmp_path / "out_a")
    assert digests == tree_digest(tmp_path / "out_b")
    assert "held_out/00000.tar" in digests and not [name for name in digests if name.startswith(".")]


def test_shards_end_at_their_bytes_too():
    sizes = np.array([40, 40, 40, 500, 10, 10, 10, 10], np.int64)
    assert cut_shards(sizes, 3, 100) == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert cut_shards(np.zeros(4, np.int64), 3, 100) == [(0, 3), (3, 4)]


def test_file_names_of_every_kind(tmp_path):
    source = tmp_path / "source"
    picture = encode_image(40, 50)
    names = ["Größe ü.JPG", "two.dots.in.it.jpeg", "日本/写真.Jpg", "a'b\"c.jfif", "-dash.JPE", "n" * 180 + ".jpg"]
    for name in names:
        write(source / name, picture)
        write((source / name).with_suffix(".TXT"), f"of {name}")
    write(source / ".hidden.jpg", picture)
    write(source / ".thumbnails" / "a.jpg", picture)
    write(source / "read me.md", "x")
    (source / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    write(tmp_path / "elsewhere.jpg", picture)
    (source / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (source / "loop").symlink_to(source, target_is_directory=True)
    report = pack_source(source, tmp_path / "out", SMALL)
    records = records_of(tmp_path / "out")
    assert records.keys() == {*names, "link.jpg"}
    assert all(records[name]["caption"] == f"of {name}" for name in names)
    assert skipped_of(tmp_path / "out") == {"nowhere.jpg": "missing_file"}
    assert report["left_out"] == {".md": 1, "hidden": 2}


def test_a_name_that_is_no_utf8(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    try:
        Path(str(source).encode().decode() + "/caf\udce9.jpg").write_bytes(encode_image(40, 50))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    pack_source(source, tmp_path / "out", SMALL)
    assert list(records_of(tmp_path / "out")) == ["caf\\xe9.jpg"]


@pytest.mark.parametrize(
    ("content", "caption", "problem"),
    [
        (b"plain", "plain", None),
        (b"\xef\xbb\xbf  with a mark\r\nand two lines \n", "with a mark\nand two lines", None),
        ("größe".encode("utf-16"), "größe", None),
        ("größe".encode("utf-32"), "größe", None),
        (b"", None, "empty_caption"),
        (b"\xef\xbb\xbf \n", None, "empty_caption"),
        (b"caf\xe9", None, "invalid_caption"),
        (b"x" * ((1 << 20) + 1), None, "invalid_caption"),
        (None, None, "missing_caption"),
    ],
)
def test_captions(tmp_path, content, caption, problem):
    source = tmp_path / "source"
    write(source / "a.jpg", encode_image(40, 50))
    if content is not None:
        write(source / "a.txt", content)
    report = pack_source(source, tmp_path / "out", SMALL)
    ((_, members),) = samples_of(tmp_path / "out").items()
    assert report["captions"] == ({problem: 1} if problem else {})
    assert report["without_caption"] == (["a.jpg"] if problem else [])
    assert json.loads(members["json"])["caption"] == caption
    expected = {None: caption, "empty_caption": ""}.get(problem)
    assert members.get("txt") == (None if expected is None else expected.encode())
    if problem:
        write(source / "b.jpg", encode_image(40, 50))
        write(source / "b.txt", "fine")
        skipping = PackOptions(missing_caption="skip")
        assert pack_source(source, tmp_path / "skipping", skipping)["num_packed"] == 1
        assert skipped_of(tmp_path / "skipping") == {"a.jpg": problem}
        # A file that is missing is known before any picture is read.
        refusal = "no caption for 1 of 2 pictures, a.jpg" if content is None else f"a.jpg: {problem}"
        with pytest.raises(DataError, match=f"{refusal}, and --missing-caption error"):
            pack_source(source, tmp_path / "refused", PackOptions(missing_caption="error"))


def test_a_record_beside_a_picture_adds_its_fields(tmp_path):
    write(tmp_path / "source" / "a.jpg", encode_image(40, 50))
    write(tmp_path / "source" / "a.json", json.dumps({"punsafe": 0.25, "width": 7, "tags": ["x"], "deep": {"a": 1}}))
    write(tmp_path / "source" / "b.jpg", encode_image(40, 50))
    write(tmp_path / "source" / "b.json", "{broken")
    pack_source(tmp_path / "source", tmp_path / "out")
    records = records_of(tmp_path / "out")
    assert records["a.jpg"]["punsafe"] == 0.25 and records["a.jpg"]["tags"] == ["x"]
    assert records["a.jpg"]["width"] == 50 and "deep" not in records["a.jpg"]
    assert "punsafe" not in records["b.jpg"]


@pytest.mark.parametrize(
    ("link", "problem"),
    [("gone", "missing_caption"), ("a.txt", "invalid_caption")],
)
def test_what_lies_beside_a_picture_and_cannot_be_read_is_not_there(tmp_path, link, problem):
    """A link that leads nowhere, and one to itself, which is another error."""
    source = tmp_path / "source"
    write(source / "a.jpg", encode_image(40, 50))
    (source / "a.txt").symlink_to(link)
    (source / "a.json").symlink_to(link.replace("txt", "json"))
    write(source / "b.jpg", encode_image(40, 50))
    write(source / "b.txt", "fine")
    report = pack_source(source, tmp_path / "out")
    assert report["num_packed"] == 2 and report["captions"] == {problem: 1}
    assert pack_source(source, tmp_path / "skipping", PackOptions(missing_caption="skip"))["skipped"] == {problem: 1}


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_storage_that_fails_beside_a_picture_stops_the_run(tmp_path, monkeypatch, name):
    source = tmp_path / "source"
    write(source / "a.jpg", encode_image(40, 50))
    write(source / "a.txt", "a caption")
    write(source / "a.json", "{}")
    opened = open

    def failing(path, *details):
        if Path(path).name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *details)

    def failing_bytes(path):
        with failing(path, "rb") as file:
            return file.read()

    with monkeypatch.context() as patch:
        patch.setattr(picture_folder, "open", failing, raising=False)
        patch.setattr(Path, "read_bytes", failing_bytes)
        with pytest.raises(OSError, match="Input/output error"):
            pack_source(source, tmp_path / "out", SMALL)
    assert pack_source(source, tmp_path / "out", SMALL)["captions"] == {}


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    source, scandir = make_folder(tmp_path / "source", 3), os.scandir

    def refuse(path):
        if os.fspath(path).endswith("part 1"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"part 1: the folder cannot be read \(Permission denied\); make it readable"):
        pack_source(source, tmp_path / "out")


def test_damaged_pictures_are_reported_by_cause(tmp_path):
    source = make_folder(tmp_path / "source", 6)
    whole = noise(64, 64)
    write(source / "cut.jpg", whole[: len(whole) // 2])
    write(source / "empty.png", b"")
    write(source / "page.jpg", b"<html>not found</html>")
    write(source / "cut.png", encode_image(64, 64, kind="PNG")[:200])
    report = pack_source(source, tmp_path / "out", SMALL)
    assert report["num_packed"] == 6 and report["num_pictures"] == 10
    assert skipped_of(tmp_path / "out") == {
        "cut.jpg": "bad_image",
        "cut.png": "bad_image",
        "empty.png": "empty_file",
        "page.jpg": "unsupported_format",
    }
    assert report["skipped"] == {"bad_image": 2, "empty_file": 1, "unsupported_format": 1}
    unchecked = pack_source(source, tmp_path / "unchecked", PackOptions(check=False))
    assert unchecked["num_packed"] == 8, "a header is enough"


def test_nothing_to_pack_is_refused(tmp_path):
    write(tmp_path / "source" / "a.jpg", b"no picture")
    with pytest.raises(DataError, match=r"not one of 1 pictures could be packed \(unsupported_format 1\)"):
        pack_source(tmp_path / "source", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_equal_pictures_are_held_out_together_whatever_is_added(tmp_path):
    source = tmp_path / "source"
    for number in range(60):
        write(source / f"{number:02d}.png", encode_image(16, 16, number // 2, "PNG"))
    options = PackOptions(samples_per_shard=7, held_out=0.4)
    report = pack_source(source, tmp_path / "out", options)
    held_out, packed = records_of(tmp_path / "out" / "held_out"), records_of(tmp_path / "out")
    assert len(held_out) == report["num_held_out"] and len(held_out) + len(packed) == 60
    # 30 different pictures at 0.4: outside 3..21 with a probability of 1 in 1,000.
    assert 6 <= len(held_out) <= 42
    assert not {r["sha256"] for r in held_out.values()} & {r["sha256"] for r in packed.values()}
    assert sum(report["held_out_shards"].values()) == len(held_out)
    assert list(report["held_out_shards"].values())[:-1] == [7] * (len(report["held_out_shards"]) - 1)
    assert not samples_of(tmp_path / "out").keys() & samples_of(tmp_path / "out" / "held_out").keys()
    for number in range(20):
        write(source / f"0 new {number}.png", encode_image(16, 16, 1000 + number, "PNG"))
    pack_source(source, tmp_path / "more", options)
    more = records_of(tmp_path / "more" / "held_out")
    assert {name for name in more if "new" not in name} == held_out.keys()


def test_the_held_out_share_is_that_of_the_hash():
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(10_000)]
    count = sum(is_held_out(digest, 0.05) for digest in digests)
    # Binomial: 500 with a standard deviation of 22.
    assert 400 <= count <= 600
    assert not any(is_held_out(digest, 0.0) for digest in digests)


def test_a_second_call_does_nothing(tmp_path):
    source = make_folder(tmp_path / "source")
    report = pack_source(source, tmp_path / "out", SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert pack_source(source, tmp_path / "out", SMALL) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")} == before


def test_other_settings_or_another_source_are_refused(tmp_path):
    source = make_folder(tmp_path / "source")
    pack_source(source, tmp_path / "out", SMALL)
    with pytest.raises(DataError, match=r"held_out 0.0 \(now 0.1\)"):
        pack_source(source, tmp_path / "out", PackOptions(samples_per_shard=5, held_out=0.1))
    assert not (tmp_path / "out" / ".packing").exists()
    write(source / "part 0" / "picture 000.txt", "a longer caption")
    with pytest.raises(DataError, match="the names, sizes or tables of the source"):
        pack_source(source, tmp_path / "out", SMALL)
    write(source / "new.jpg", encode_image(40, 50))
    with pytest.raises(DataError, match=r"num_pictures 12 \(now 13\)"):
        pack_source(source, tmp_path / "out", SMALL)


def test_a_call_that_wrote_nothing_can_be_repeated_with_other_options(tmp_path):
    write(tmp_path / "source" / "a.jpg", encode_image(40, 50))
    write(tmp_path / "source" / "a.txt", " ")
    with pytest.raises(DataError, match="a.jpg: empty_caption"):
        pack_source(tmp_path / "source", tmp_path / "out", PackOptions(missing_caption="error"))
    assert pack_source(tmp_path / "source", tmp_path / "out")["num_packed"] == 1


def test_files_of_others_are_left_alone(tmp_path):
    source = make_folder(tmp_path / "source", 3)
    write(tmp_path / "out" / "00000.tar", b"precious")
    with pytest.raises(DataError, match=r"holds '00000.tar' and was not made by this command"):
        pack_source(source, tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"precious"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.tar"]
    with pytest.raises(DataError, match="is a file"):
        pack_source(source, write(tmp_path / "file", b""))
    with pytest.raises(DataError, match="lies in the source"):
        pack_source(source, source / "shards")


def test_a_disk_without_room_is_refused_at_the_start(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr("bitdance_scale.data.shard_writing.pack.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"need about .* kB, 1.00 kB are free"):
        pack_source(make_folder(tmp_path / "source"), tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_storage_that_fails_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    source = make_folder(tmp_path / "source")
    read_bytes = Path.read_bytes

    def failing(path):
        if path.name == "picture 007.png":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match="Input/output error"):
            pack_source(source, tmp_path / "out", SMALL)
    pack_source(source, tmp_path / "out", SMALL)
    pack_source(source, tmp_path / "whole", SMALL)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file or folder"),
        (lambda path: path.mkdir(), "holds no pictures"),
        (lambda path: write(path / "00000.tar", b""), "shards already"),
        (lambda path: write(path, b""), "a file of this kind cannot be packed"),
    ],
)
def test_sources_that_are_none(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(DataError, match=message):
        pack_source(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    with output_folder.OutputFolder(tmp_path / "out", {}, 1), pytest.raises(DataError, match="another process packs"):
        pack_source(make_folder(tmp_path / "source", 3), tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_packed_into(tmp_path, monkeypatch, caplog, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(output_folder.fcntl, "flock", flock)
    assert pack_source(make_folder(tmp_path / "source", 3), tmp_path / "out")["num_packed"] == 3
    assert f"out: cannot be locked ({os.strerror(code)})" in caplog.text
