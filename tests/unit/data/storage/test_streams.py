"""Tars that are read from front to back: files, commands, HTTP; and every way in which they can break."""

from __future__ import annotations

import contextlib
import gzip
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bitdance_scale.data.storage.streams import BrokenStreamError, TarStream, expand_streams
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import write_tar

SAMPLES = {f"{number:03d}": {"jpg": bytes([number]) * 700, "txt": b"text %d" % number} for number in range(8)}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "shards" / "0.tar", SAMPLES)


def keys_until_broken(url: object) -> tuple[list[str], str]:
    """Keys of the samples of a stream, and how it broke; empty if it did not."""
    keys: list[str] = []
    try:
        keys.extend(members["__key__"] for members in TarStream(str(url)))
    except BrokenStreamError as error:
        return keys, str(error)
    return keys, ""


def test_a_file_a_command_and_an_address_give_the_same_samples(tar):
    with serving(tar.parent) as address:
        for url in (str(tar), f"pipe:cat {tar}", f"pipe:cat {tar} | cat", f"{address}/0.tar"):
            found = {members["__key__"]: members for members in TarStream(url)}
            assert found.keys() == SAMPLES.keys()
            for key, members in SAMPLES.items():
                assert {name: found[key][name] for name in members} == members


def test_every_cut_is_noticed(tar, tmp_path):
    content = tar.read_bytes()
    with tarfile.open(tar) as opened:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in opened)
    broken = tmp_path / "broken.tar"
    for size in [0, 1, 511, 512, 513, 900, *range(1024, end, 256), end - 1, end]:
        broken.write_bytes(content[:size])
        keys, problem = keys_until_broken(broken)
        assert problem, size
        assert keys == list(SAMPLES)[: len(keys)]
        assert len(keys) < len(SAMPLES), "the last sample may be incomplete"


@pytest.mark.parametrize("number", range(1, 16))
def test_a_damaged_header_is_noticed_wherever_it_is(tar, tmp_path, number):
    with tarfile.open(tar) as opened:
        offset = opened.getmembers()[number].offset
    for name, damage in {"flipped": b"\xff", "zeroed": bytes(512)}.items():
        content = bytearray(tar.read_bytes())
        content[offset + 3 : offset + 3 + 1] = damage if name == "flipped" else content[offset + 3 : offset + 4]
        if name == "zeroed":
            content[offset : offset + 512] = damage
        broken = tmp_path / f"{name}.tar"
        broken.write_bytes(content)
        keys, problem = keys_until_broken(broken)
        assert problem and keys == list(SAMPLES)[: len(keys)] and len(keys) < len(SAMPLES), name


def test_commands_that_fail_or_stop_early_are_noticed(tar):
    whole = len(tar.read_bytes())
    for command in (f"cat {tar}; exit 3", f"head -c {whole // 2} {tar}", "true", "exit 1", "no-such-command-here"):
        assert keys_until_broken(f"pipe:{command}")[1], command


def test_servers_that_fail_are_noticed(tar):
    with serving(tar.parent) as address:
        assert "exit code 22" in keys_until_broken(f"{address}/gone.tar")[1]
    assert keys_until_broken(f"{address}/0.tar")[1], "no server any more"


def test_compressed_tars_are_refused_with_the_way_out(tar, tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    keys, problem = keys_until_broken(tmp_path / "0.tar.gz")
    assert not keys and "pipe:gzip -dc PATH" in problem
    assert keys_until_broken(f"pipe:gzip -dc {tmp_path / '0.tar.gz'}") == (list(SAMPLES), "")


def test_of_a_member_that_comes_twice_the_first_counts(tmp_path):
    path = tmp_path / "twice.tar"
    write_tar(path, {"a": {"txt": b"first", "TXT": b"second", "jpg": b"x"}, "b": {"txt": b"next"}})
    assert [members["txt"] for members in TarStream(str(path))] == [b"first", b"next"]


def test_a_command_that_hangs_can_be_stopped():
    stream = TarStream("pipe:sleep 600 | cat")
    threading.Timer(0.3, stream.stop).start()
    begun_s = time.monotonic()
    assert keys_until_broken_of(stream)
    assert time.monotonic() - begun_s < 60


def keys_until_broken_of(stream: TarStream) -> str:
    try:
        list(stream)
    except BrokenStreamError as error:
        return str(error)
    return ""


def test_lists_are_expanded(tar):
    commands = expand_streams(["pipe:cat {a,b}.tar", "http://host/{00..02}.tar", str(tar.parent)])
    assert commands == ["pipe:cat a.tar", "pipe:cat b.tar", *(f"http://host/0{n}.tar" for n in range(3)), str(tar)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("s3://bucket/a.tar", "set data.mode = 'indexed'"),
        ("https://user:word@host/a.tar", "holds a user or password"),
        ("/nowhere/a.tar", "does not exist"),
    ],
)
def test_what_is_no_stream_is_refused(spec, message):
    with pytest.raises(DataError, match=message):
        expand_streams([spec])
    with pytest.raises(DataError, match="is empty"):
        expand_streams([])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [3 << 30, 1 << 34])
def test_a_member_of_gigabytes_is_not_held_in_memory(tar, tmp_path, kind, size):
    """A command could go on for hours; what came before it is used."""
    content, header = tar.read_bytes(), tarfile.TarInfo("huge.jpg")
    header.size, header.type = size, kind
    with tarfile.open(tar) as opened:
        end = opened.getmembers()[8].offset
    (tmp_path / "head").write_bytes(content[:end] + header.tobuf(tarfile.GNU_FORMAT))
    keys, problem = keys_until_broken(f"pipe:cat {tmp_path / 'head'} /dev/zero")
    # The sample before it may be incomplete.
    assert keys == list(SAMPLES)[: len(keys)] and len(keys) >= 2
    assert "member 'huge.jpg' has " in problem and "the limit is " in problem
