"""Tars that are unusual or hostile: what they lack is counted, named with the way out, and costs little time."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdance_scale.data.images.limits import MAX_IMAGE_BYTES
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import check_skipped, skipped_samples
from bitdance_scale.data.index.tar_scan import MAX_TAR_ERRORS, TarScan
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import encode_image, sample_members, write_tar

Tar = tarfile.TarFile


def add(tar: Tar, name: str, content: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def add_sample(tar: Tar, key: str, seed: int) -> None:
    for extension, content in sample_members(16, 24, f"picture {seed}", seed).items():
        add(tar, f"{key}.{extension}", content)


def indexed(path: Path, fill: Callable[[Tar], None], kind: int = tarfile.GNU_FORMAT) -> Index:
    with tarfile.open(path, "w", format=kind) as tar:
        fill(tar)
    return build_index([str(path)], path.with_suffix(".index"))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_hard_link_is_the_sample_that_it_names(tmp_path: Path, kind: int) -> None:
    """Also if names differ in `./`, if a link names a link, and if the target's name needs a header of its own."""
    folder = "./" if kind == tarfile.USTAR_FORMAT else "./" + "d" * 120 + "/"

    def fill(tar: Tar) -> None:
        for number in range(3):
            add_sample(tar, f"{folder}00{number}", number)
        for extension in ("jpg", "json", "txt"):
            add(tar, f"003.{extension}", type=tarfile.LNKTYPE, linkname=f"{folder}000.{extension}")
            add(tar, f"004.{extension}", type=tarfile.LNKTYPE, linkname=f"./003.{extension}")

    index = indexed(tmp_path / "0.tar", fill, kind)
    assert [index.name(sample).rpartition("/")[2] for sample in range(5)] == ["000", "001", "002", "003", "004"]
    assert [index.caption(sample) for sample in range(5)] == [f"picture {n}" for n in (0, 1, 2, 0, 0)]
    assert index.errors() == {}
    reader = ShardReader()
    assert reader.image(index, 4) == reader.image(index, 0) == sample_members(16, 24, "", 0)["jpg"]


def test_a_hard_link_to_nothing_is_a_lost_sample(tmp_path: Path) -> None:
    def fill(tar: Tar) -> None:
        add_sample(tar, "0", 0)
        add(tar, "1.jpg", type=tarfile.LNKTYPE, linkname="gone.jpg")
        add(tar, "1.txt", b"red")

    index = indexed(tmp_path / "0.tar", fill)
    assert index.errors() == {"broken_link": {str(tmp_path / "0.tar"): 1}} and len(index) == 1
    with pytest.raises(DataError, match="hard links to files that are not in the tar; write the tar again"):
        check_skipped(index, 0.0)


def test_symbolic_links_are_named_with_the_way_out(tmp_path: Path) -> None:
    def fill(tar: Tar, with_sound: bool) -> None:
        for number in range(2):
            for extension in ("jpg", "json", "txt"):
                add(tar, f"./{number}.{extension}", type=tarfile.SYMTYPE, linkname=f"../d/{number}.{extension}")
        if with_sound:
            add_sample(tar, "./2", 2)

    path = tmp_path / "0.tar"
    with pytest.raises(DataError, match="0.tar: 2 symbolic_link .*symbolic links instead of images; .*`tar -h`"):
        indexed(path, lambda tar: fill(tar, False))
    index = indexed(path, lambda tar: fill(tar, True))
    assert skipped_samples(index) == {str(path): 2} and index.name(0) == "./2"
    with pytest.raises(DataError, match="about 2 of 3 samples would be skipped.*`tar -h`"):
        check_skipped(index, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x" * 2000, mtime=0), "is gzip-compressed; unpack it .`gunzip -c"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "is zstd-compressed"),
        (b"BZh91AY&SY" + bytes(2000), "is bzip2-compressed"),
        (b"\xfd7zXZ\0" + bytes(2000), "is xz-compressed"),
        (b"PK\x03\x04" + bytes(2000), "is a zip archive"),
        (b"PAR1" + bytes(2000), "is a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\n".ljust(600), "is a pointer of git-lfs"),
        (b"<!DOCTYPE html>".ljust(600), "is a web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "is a pointer of git-lfs"),
    ],
)
def test_files_that_are_no_tar_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"0.tar: byte 0: no tar: the file {message}"):
        build_index([str(tmp_path / "0.tar")], tmp_path / "index")
    sound = str(write_tar(tmp_path / "1.tar", {"0": sample_members(16, 16, "a")}))
    index = build_index([str(tmp_path / "0.tar"), sound], tmp_path / "index")
    with pytest.raises(DataError, match=message):
        check_skipped(index, 0.1)


def test_equal_keys_in_joined_tars_count_as_lost(tmp_path: Path) -> None:
    """Neighbours or not; a caption never gets the image of another sample."""

    def fill(tar: Tar) -> None:
        for number in (0, 1, 2, 0, 1, 2, 2):
            add_sample(tar, f"{number}", number)
        add(tar, "3.txt", b"of an image that is lost")
        add_sample(tar, "4", 4)
        add_sample(tar, "3", 3)

    path = tmp_path / "0.tar"
    index = indexed(path, fill)
    assert [(index.name(n), index.caption(n)) for n in range(5)] == [(str(n), f"picture {n}") for n in (0, 1, 2, 3, 4)]
    assert index.errors() == {"duplicate_sample": {str(path): 4}, "missing_image": {str(path): 1}}
    with pytest.raises(DataError, match="about 5 of 10 samples would be skipped.*joined with `tar -A`"):
        check_skipped(index, 0.0)


def test_members_need_not_be_neighbours(tmp_path: Path) -> None:
    def fill(tar: Tar) -> None:
        for extension in ("jpg", "json", "txt"):
            for number in range(4):
                add(tar, f"{number}.{extension}", sample_members(16, 24, f"picture {number}", number)[extension])

    index = indexed(tmp_path / "0.tar", fill)
    assert [index.caption(n) for n in range(4)] == [f"picture {n}" for n in range(4)] and index.errors() == {}


def test_dotted_names_count_as_lost(tmp_path: Path) -> None:
    """But not a second image beside that of the sample."""

    def fill(tar: Tar) -> None:
        for number in range(3):
            add(tar, f"photo.v2.{number}.jpg", encode_image(16, 16))
        add_sample(tar, "0", 0)
        add(tar, "0.seg.png", encode_image(16, 16, kind="PNG"))

    path = tmp_path / "0.tar"
    index = indexed(path, fill)
    assert len(index) == 1 and index.errors() == {"dotted_name": {str(path): 3}}
    with pytest.raises(DataError, match="about 3 of 4 samples .*a key ends at the first dot.*replace the other dots"):
        check_skipped(index, 0.0)


def test_a_byte_order_mark_is_no_caption(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    jpg = encode_image(16, 24)
    samples = {
        "text": {"jpg": jpg, "txt": mark + b"red"},
        "record": {"jpg": jpg, "json": mark + json.dumps({"caption": "\ufeffred", "width": 24, "height": 16}).encode()},
        "nothing": {"jpg": jpg, "txt": mark},
    }
    index = build_index([str(write_tar(tmp_path / "0.tar", samples))], tmp_path / "index")
    assert [index.caption(n) for n in range(3)] == ["red", "red", ""]
    assert index.status("caption").tolist() == [0, 0, 1] and index.errors() == {}


def test_sides_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    """Whether the record has the sides before the rotation, after it, or none; and what re-encoding has lost."""
    turned, lost = rotated(encode_image(40, 60)), encode_image(40, 60)
    exif = json.dumps({"Image Orientation": "Rotated 90 CW"})
    records = {
        "stored": (turned, {"width": 60, "height": 40, "original_width": 120, "original_height": 80}),
        "upright": (turned, {"width": 40, "height": 60, "exif": exif}),
        "none": (turned, {}),
        "lost": (lost, {"width": 60, "height": 40, "exif": exif}),
        "plain": (lost, {"width": 60, "height": 40, "exif": "{}"}),
    }
    samples = {key: {"jpg": jpg, "json": json.dumps(record).encode()} for key, (jpg, record) in records.items()}
    path = str(write_tar(tmp_path / "0.tar", samples))
    index = build_index([path], tmp_path / "index")
    assert index.sizes_px(slice(None)).tolist() == [[60, 40]] * 3 + [[40, 60]] * 2
    assert index.original_sizes_px(slice(None))[0].tolist() == [120, 80]
    assert index.errors() == {"lost_rotation": {path: 1}} and skipped_samples(index) == {}


def rotated(jpg: bytes) -> bytes:
    """The file with an EXIF segment that says orientation 6."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    return jpg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpg[2:]


def pax(records: bytes) -> bytes:
    """A pax header with these records, and then a sample of one image."""
    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", len(records)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        add_sample(tar, "after", 1)
        add_sample(tar, "sound", 2)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + file.getvalue()


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" path=x\n",
        b"9" * 400_000,
        b"5 a=\n" * 200_000,
        b"12 path=abc\n" * 80_000,
        b"-5 path=x\n",
        b"3 a\n",
        b"99 path=x\n",
        b"0 path=x\n",
        b"".join(b"%d path=%s\n" % (200_012, b"x" * 199_999) for _ in range(2)),
    ],
)
def test_pax_records_cost_time_in_proportion(tmp_path: Path, records: bytes) -> None:
    """Seconds for each of these before; the limit is far above what is needed, on any machine."""
    (tmp_path / "0.tar").write_bytes(pax(records))
    begun = time.process_time()
    index = build_index([str(tmp_path / "0.tar")], tmp_path / "index")
    assert time.process_time() - begun < 2
    assert index.name(len(index) - 1) == "sound"
    assert all(error.offset == 0 for error in index.shards[0].tar_errors)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x"])
def test_a_long_name_of_gigabytes_is_not_read(kind: bytes) -> None:
    """The member after it has no name that could be trusted, so it is left out; the rest is found."""
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 3 << 30
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        add(tar, "0.jpg", b"x")
        add(tar, "1.jpg", b"y")
    head, tail = info.tobuf(tarfile.GNU_FORMAT), file.getvalue()
    begin, most = len(head) + info.size, 0

    def read(offset: int, num_bytes: int) -> bytes:
        nonlocal most
        most = max(most, num_bytes)
        if offset >= begin:
            return tail[offset - begin : offset - begin + num_bytes]
        return head[offset : offset + num_bytes].ljust(min(num_bytes, begin + len(tail) - offset), b"\0")

    scan = TarScan(read, begin + len(tail))
    assert [name for members in scan for name in members.names] == [b"1.jpg"]
    assert [(error.offset, error.problem[:4]) for error in scan.tar_errors] == [(0, "a pa" if kind == b"x" else "a GN")]
    assert most <= 4 << 20


def test_an_image_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """A sparse file: only its headers are on the disk."""
    path, info = tmp_path / "0.tar", tarfile.TarInfo("0.jpg")
    info.size = MAX_IMAGE_BYTES + 1
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        add_sample(tar, "1", 1)
    with open(path, "wb") as shard:
        shard.write(info.tobuf(tarfile.GNU_FORMAT))
        shard.seek(512 + info.size + -info.size % 512)
        shard.write(file.getvalue())
    index = build_index([str(path)], tmp_path / "index")
    assert (len(index), index.errors()) == (1, {"too_large": {str(path): 1}})


def test_thousands_of_tar_errors_are_counted_and_few_kept(tmp_path: Path) -> None:
    block = tarfile.TarInfo("x.txt").tobuf(tarfile.USTAR_FORMAT)
    damaged = b"#" + block[1:]
    sound = write_tar(tmp_path / "sound.tar", {"0": sample_members(16, 16, "a")}).read_bytes()
    path = tmp_path / "0.tar"
    path.write_bytes((damaged + block) * 2000 + sound)
    index = build_index([str(path)], tmp_path / "index")
    assert len(index.shards[0].tar_errors) == MAX_TAR_ERRORS
    assert index.errors()["damaged_tar"] == {str(path): 2000}
    assert skipped_samples(index) == {str(path): 2000} and len(index) == 1
