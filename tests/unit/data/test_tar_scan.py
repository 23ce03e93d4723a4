"""Scanning tars: agrees with tarfile on whole ones, and names the place in broken ones."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import pytest

from bitdance_scale.data.tar_scan import scan_members
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", FORMATS)
def test_agrees_with_tarfile(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    # Ustar splits long names between two fields, GNU and pax add a member for them.
    names = ["0.jpg", "folder/0.txt", "d" * 90 + "/" + "n" * 60 + ".json", "empty.txt", "d" * 99 + "/" + "n" * 12]
    names += ["d" * 200 + "/" + "ü" * 120 + ".jpg"] if kind != "ustar" else []
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty.txt" else 700 * number + 5
            info.mtime = 1.5
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    members = list(scan_members(str(path)))
    assert [(m.name, m.offset, m.num_bytes) for m in members] == expected
    assert [m.header_crc for m in members] == [zlib.crc32(content[m.offset - 512 : m.offset]) for m in members]


def broken(tmp_path: Path, change: object) -> str:
    path = write_tar(tmp_path / "whole.tar", {"0": {"jpg": b"x" * 1000, "txt": b"red"}, "1": {"jpg": b"y" * 600}})
    content = bytearray(path.read_bytes())
    content = change(content)
    (tmp_path / "broken.tar").write_bytes(content)
    return str(tmp_path / "broken.tar")


def put(content: bytearray, offset: int, value: bytes) -> bytearray:
    content[offset : offset + len(value)] = value
    return content


# Headers of the three members lie at bytes 0, 1536 and 2560, the end mark at 4096.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:1800], r"byte 1536: the tar ends without an end-of-archive mark"),
        (
            lambda c: c[:900],
            r"byte 0: member '0.jpg' of 1000 bytes reaches past the end of the file \(900 bytes\): it was cut",
        ),
        (lambda c: c[:2560], r"byte 2560: the tar ends without an end-of-archive mark"),
        (lambda c: c[:0], r"byte 0: the tar ends without an end-of-archive mark"),
        (lambda c: put(c, 1540, b"!"), r"byte 1536: the tar header fails its checksum"),
        (lambda c: put(c, 1536, bytes(512)), r"byte 1536: an empty header, but data goes on at byte 2048"),
    ],
    ids=["cut in header", "cut in body", "cut at a member", "no bytes", "flipped header byte", "zeroed block"],
)
def test_damage_is_named(tmp_path: Path, change: object, message: str) -> None:
    with pytest.raises(DataError, match=f"broken.tar: {message}.*Fetch or write the shard again"):
        list(scan_members(broken(tmp_path, change)))


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.tar: cannot open the shard"):
        list(scan_members(str(tmp_path / "none.tar")))
