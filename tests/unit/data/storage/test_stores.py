"""Stores: what they import, that they can be sent to another process, and that local reads are repeated."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.data.storage import open_files
from bitdance_scale.data.storage.open_files import OpenFiles
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.data.storage.stores import Stores

pread = os.pread


def test_local_shards_do_not_import_boto3() -> None:
    code = "import sys, bitdance_scale.data.reader; sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_copy_by_pickle_reads_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"0123456789")
    stores = Stores(S3Section(anonymous=True), max_open_files=3)
    assert stores.read(str(path), 2, 3) == b"234"
    copy = pickle.loads(pickle.dumps(stores))
    assert copy.read(str(path), 8, 100) == b"89"
    assert copy.__reduce__() == stores.__reduce__() == (Stores, (S3Section(anonymous=True), 3))


class FailingReads:
    """`os.pread` on a file system that fails the first reads.

    Args:
        code: errno of the failures.
        num_failures: how many there are.

    Attributes:
        descriptors: in which was read, failed reads included.
    """

    def __init__(self, code: int, num_failures: int) -> None:
        self.descriptors: list[int] = []
        self._code, self._num_failures = code, num_failures

    def __call__(self, descriptor: int, num_bytes: int, offset: int) -> bytes:
        self.descriptors.append(descriptor)
        if len(self.descriptors) <= self._num_failures:
            raise OSError(self._code, os.strerror(self._code))
        return pread(descriptor, num_bytes, offset)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(open_files, "time", SimpleNamespace(sleep=made.append))
    return made


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "0.tar"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_read_that_fails_is_repeated_on_a_file_that_is_opened_again(
    shard: Path, code: int, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `rsync` on a file server: the descriptor is of a file that is gone, and another one has its name."""
    stores = Stores()
    assert stores.read(str(shard), 0, 3) == b"012"
    shard.with_name("new").write_bytes(b"abcdefghij")
    os.replace(shard.with_name("new"), shard)
    monkeypatch.setattr(os, "pread", FailingReads(code, 1))
    assert stores.read(str(shard), 2, 3) == b"cde"
    assert pauses == [0.1]
    # And not on the one that failed, later.
    assert stores.read(str(shard), 8, 3) == b"ij"


def test_a_read_that_always_fails_ends_after_three_repetitions(
    shard: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, reads = Stores(), FailingReads(errno.EIO, 100)
    monkeypatch.setattr(os, "pread", reads)
    with pytest.raises(ReadError, match=os.strerror(errno.EIO)):
        stores.read(str(shard), 0, 3)
    assert len(reads.descriptors) == 4 and pauses == [0.1, 0.5, 2.0]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_an_error_that_stays_is_not_repeated(
    shard: Path, code: int, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = FailingReads(code, 1)
    monkeypatch.setattr(os, "pread", reads)
    with pytest.raises(ReadError, match=os.strerror(code)):
        Stores().read(str(shard), 0, 3)
    with pytest.raises(ReadError, match="No such file"):
        Stores().read(f"{shard}.gone", 0, 3)
    assert len(reads.descriptors) == 1 and pauses == []


@pytest.mark.parametrize("second_fails", [False, True])
def test_threads_share_the_file_that_was_opened_again(
    shard: Path, second_fails: bool, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads read in one descriptor, which fails in one of them; the read of the other ends after that."""
    files: OpenFiles[str] = OpenFiles(str, 3)
    opened: list[int] = []
    has_begun, may_end, system_open = threading.Event(), threading.Event(), os.open
    first, second = FailingReads(errno.ESTALE, 1), FailingReads(errno.ESTALE, int(second_fails))

    def open_file(path: str, flags: int) -> int:
        opened.append(system_open(path, flags))
        return opened[-1]

    def read(descriptor: int, num_bytes: int, offset: int) -> bytes:
        if offset < 5:
            return first(descriptor, num_bytes, offset)
        has_begun.set()
        assert may_end.wait(60)
        return second(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "pread", read)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(files.read, str(shard), 5, 2)
        assert has_begun.wait(60)
        assert files.read(str(shard), 1, 2) == b"12"
        # The slow read holds the first descriptor: its number was not given to the file that was opened again.
        assert len(opened) == len(set(opened)) == 2 and first.descriptors == opened
        may_end.set()
        assert slow.result() == b"56"
    assert len(opened) == 2 and second.descriptors == opened[: 1 + second_fails]
