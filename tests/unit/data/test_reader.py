"""Reading by offset: the right bytes, from many threads, with few open files."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.data.storage.stores import Stores
from tests.unit.data.small_data import members_of, write_tar


def num_open_files(folder: Path) -> int:
    """Descriptors of this process that are open on files below a folder."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/")
    return count


def test_threads_share_few_descriptors(tmp_path: Path) -> None:
    shards = [
        str(write_tar(tmp_path / f"{s}.tar", {str(k): {"jpg": bytes([s, k]) * (100 + k)} for k in range(8)}))
        for s in range(12)
    ]
    jobs = [place for path in shards for place in members_of(path)]
    reader = ShardReader(Stores(max_open_files=3))
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(reader.read, jobs * 5))
    assert contents == [bytes([s, k]) * (100 + k) for s in range(12) for k in range(8)] * 5
    assert 1 <= num_open_files(tmp_path) <= 3
    reader.close()
    assert num_open_files(tmp_path) == 0


def test_an_evicted_shard_stays_open_for_the_read_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_tar(tmp_path / "0.tar", {"0": {"jpg": b"x" * 900}}))
    reader = ShardReader()
    pread = os.pread

    def pread_after_eviction(descriptor: int, num_bytes: int, offset: int) -> bytes:
        reader.close()
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", pread_after_eviction)
    assert reader.read(members_of(path)[0]) == b"x" * 900


def test_missing_cut_and_replaced_shards_are_sample_errors(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "0.tar", {"0": {"jpg": b"x" * 900}}))
    place = members_of(path)[0]
    os.rename(path, f"{path}.gone")
    with pytest.raises(SampleError, match="No such file") as missing:
        ShardReader().read(place)
    assert missing.value.cause == ErrorCause.READ_FAILED
    Path(path).write_bytes(Path(f"{path}.gone").read_bytes()[:1000])
    with pytest.raises(SampleError, match="the shard ends before them") as cut:
        ShardReader().read(place)
    assert cut.value.cause == ErrorCause.READ_FAILED
    write_tar(tmp_path / "0.tar", {"1": {"jpg": b"y" * 900}})
    with pytest.raises(SampleError, match="bytes 0..1412: they do not have the checksum") as replaced:
        ShardReader().read(place)
    assert replaced.value.cause == ErrorCause.SHARD_CHANGED
