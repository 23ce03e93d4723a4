"""Walking tars: agrees with tarfile on sound ones; in broken ones it names the place and finds all the rest."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitdance_scale.data.index.tar_scan import BLOCK_BYTES, TarScan
from tests.unit.data.small_data import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Found = list[tuple[bytes, int, int]]


def scan(content: bytes, window_bytes: int = 1 << 20) -> tuple[Found, list[tuple[int, str]]]:
    """(name, offset, bytes) of every member, and the tar errors."""
    tar = TarScan(lambda offset, num_bytes: content[offset : offset + num_bytes], len(content), window_bytes)
    found: Found = []
    for members in tar:
        assert content[members.start : members.start + len(members.window)] == members.window
        found += zip(members.names, members.offsets, members.num_bytes, strict=True)
    return found, [(error.offset, error.problem) for error in tar.tar_errors]


@pytest.mark.parametrize("window_bytes", [512, 3000, 1 << 20])
@pytest.mark.parametrize("kind", FORMATS)
def test_agrees_with_tarfile(tmp_path: Path, kind: str, window_bytes: int) -> None:
    path = tmp_path / "a.tar"
    # Ustar splits long names between two fields; GNU and pax add a member for them.
    names = ["0.jpg", "folder/0.txt", "d" * 90 + "/" + "n" * 60 + ".json", "empty.txt", "d" * 99 + "/" + "n" * 12]
    names += ["x" * 100, "last.jpg"] + (["d" * 200 + "/" + "ü" * 120 + ".jpg"] if kind != "ustar" else [])
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
        expected = [(m.name.encode(), m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    found, tar_errors = scan(content, window_bytes)
    assert found == expected and tar_errors == []


def test_members_of_eight_gibibytes_and_more() -> None:
    """GNU headers write such a size in base 256, pax headers in a member of their own; the contents are not read."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.bin")
        info.size = (1 << 33) + 5
        header = info.tobuf(kind)
        small = tarfile.TarInfo("0.txt")
        small.size = 3
        tail = small.tobuf(kind) + b"red".ljust(BLOCK_BYTES, b"\0") + bytes(2 * BLOCK_BYTES)
        begin = len(header) + (1 << 33) + BLOCK_BYTES
        total = begin + len(tail)

        def read(offset: int, num_bytes: int, header: bytes = header, begin: int = begin, tail: bytes = tail) -> bytes:
            num_bytes = min(num_bytes, begin + len(tail) - offset)
            part = header[offset : offset + num_bytes].ljust(num_bytes, b"\0")
            if offset + num_bytes > begin:
                cut = max(0, begin - offset)
                part = part[:cut] + tail[max(0, offset - begin) :][: num_bytes - cut]
            return part

        tar = TarScan(read, total)
        found = [(name, size) for m in tar for name, size in zip(m.names, m.num_bytes, strict=True)]
        assert found == [(b"big.bin", info.size), (b"0.txt", 3)] and tar.tar_errors == []


def whole(tmp_path: Path) -> bytes:
    """Headers of the three members lie at bytes 0, 1536 and 2560, the end mark at 4096."""
    path = write_tar(tmp_path / "whole.tar", {"0": {"jpg": b"x" * 1000, "txt": b"red"}, "1": {"jpg": b"y" * 600}})
    return path.read_bytes()


def put(content: bytes, offset: int, value: bytes) -> bytes:
    return content[:offset] + value + content[offset + len(value) :]


@pytest.mark.parametrize(
    ("change", "offset", "problem", "left"),
    [
        (lambda c: c[:1800], 1536, "the tar ends without an end-of-archive mark", ["0.jpg"]),
        (lambda c: c[:900], 0, "member '0.jpg' of 1000 bytes reaches past the end of the file (900 bytes)", []),
        (lambda c: c[:2560], 2560, "the tar ends without an end-of-archive mark", ["0.jpg", "0.txt"]),
        (lambda c: c[:0], 0, "the tar ends without an end-of-archive mark", []),
        (lambda c: put(c, 1540, b"!"), 1536, "the tar header fails its checksum", ["0.jpg", "1.jpg"]),
        (lambda c: put(c, 130, b"!"), 0, "the tar header fails its checksum", ["0.txt", "1.jpg"]),
        (
            lambda c: put(c, 1536, bytes(512)),
            1536,
            "an empty header, but there is data at byte 2048",
            ["0.jpg", "1.jpg"],
        ),
        (lambda c: c[:2048] + c, 2560, "the tar header fails its checksum", ["0.jpg", "0.txt", "0.txt", "1.jpg"]),
        (lambda c: c + c, 4096, "an empty header, but there is data at", ["0.jpg", "0.txt", "1.jpg"] * 2),
    ],
    ids=[
        "cut in header",
        "cut in body",
        "cut at a member",
        "no bytes",
        "flipped byte of a name",
        "flipped byte of a size",
        "zeroed block",
        "bytes put in between",
        "two tars in one file",
    ],
)
def test_tar_errors_are_named_and_passed(
    tmp_path: Path, change: Callable[[bytes], bytes], offset: int, problem: str, left: list[str]
) -> None:
    for window_bytes in (600, 1 << 20):
        found, tar_errors = scan(change(whole(tmp_path)), window_bytes)
        assert [name.decode() for name, *_ in found] == left
        assert len(tar_errors) == 1 and tar_errors[0][0] == offset and tar_errors[0][1].startswith(problem), tar_errors


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans())
@example(seed=0, num_places=1, is_cut=True)
def test_random_tar_errors_cost_only_the_members_that_they_hit(
    tmp_path_factory, seed: int, num_places: int, is_cut: bool
) -> None:
    """Bytes are overwritten or zeroed, or the end is cut off: the walk ends and finds every other member unchanged."""
    draw = np.random.default_rng(seed)
    path = write_tar(
        tmp_path_factory.mktemp("tar") / "a.tar",
        {str(n): {"jpg": draw.bytes(int(draw.integers(0, 3000))), "txt": b"red"} for n in range(12)},
    )
    content = bytearray(path.read_bytes())
    expected, tar_errors = scan(bytes(content))
    assert len(expected) == 24 and tar_errors == []
    hit = np.zeros(len(content), bool)
    for _ in range(num_places):
        start, length = int(draw.integers(len(content))), int(draw.choice([1, 1, 512, 2000]))
        stop = min(start + length, len(content))
        content[start:stop] = draw.bytes(stop - start) if draw.random() < 0.5 else bytes(stop - start)
        hit[start:stop] = True
    length = int(draw.integers(len(content))) if is_cut else len(content)
    found, tar_errors = scan(bytes(content[:length]), int(draw.choice([512, 4096, 1 << 20])))
    for member in expected:
        _, offset, num_bytes = member
        is_whole = offset + num_bytes + -num_bytes % BLOCK_BYTES <= length
        if is_whole and not hit[offset - BLOCK_BYTES : offset].any():
            assert member in found, (member, tar_errors)
        # Nothing but zeros is a valid end.
        if not is_whole and any(content[offset - BLOCK_BYTES : length]):
            assert tar_errors
