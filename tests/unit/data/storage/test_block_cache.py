"""The block cache: the right bytes, fetched once per node, within the size limit."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.data.storage.block_cache import BlockCache
from bitdance_scale.errors import DataError

BLOCK = 1 << 18
CONTENT = np.random.default_rng(0).bytes(5 * BLOCK + 70_001)


def make_cache(folder: Path, max_bytes: int = 1 << 30, patience_s: float = 20.0) -> BlockCache:
    return BlockCache(folder, max_bytes, BLOCK, patience_s)


def fetch(offset: int, num_bytes: int) -> bytes:
    return CONTENT[offset : offset + num_bytes]


def no_fetch(offset: int, num_bytes: int) -> bytes:
    raise AssertionError(f"{offset}, {num_bytes}: fetched although it is kept")


def block_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if path.parent.name != "locks")


def random_ranges(count: int, seed: int = 1) -> list[tuple[int, int]]:
    numbers = np.random.default_rng(seed)
    return [(int(numbers.integers(len(CONTENT))), int(numbers.integers(1, 2 * BLOCK))) for _ in range(count)]


def read_all(folder: Path, seed: int, log: Path) -> None:
    """What each process does: reads random ranges and logs what it fetched."""

    def fetch_slowly(offset: int, num_bytes: int) -> bytes:
        time.sleep(0.05)
        with open(log, "a") as file:
            file.write(f"{offset}\n")
        return fetch(offset, num_bytes)

    cache = make_cache(folder)
    for offset, num_bytes in random_ranges(40, seed):
        assert cache.read("object", offset, num_bytes, fetch_slowly) == CONTENT[offset : offset + num_bytes]


def test_any_range_is_read_correctly(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    edges = [(0, 1), (BLOCK - 1, 2), (BLOCK, BLOCK), (0, len(CONTENT)), (len(CONTENT) - 1, 1), (len(CONTENT) - 5, 99)]
    for offset, num_bytes in edges + random_ranges(100):
        assert cache.read("object", offset, num_bytes, fetch) == CONTENT[offset : offset + num_bytes]
    assert cache.num_fetches == 6
    assert make_cache(tmp_path).read("object", 7, 3 * BLOCK, no_fetch) == CONTENT[7 : 7 + 3 * BLOCK]


def test_another_version_is_another_object(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert cache.read("s3://a/0.tar v1", 0, 4, fetch) == CONTENT[:4]
    assert cache.read("s3://a/0.tar v2", 0, 4, lambda *_: b"new!") == b"new!"
    assert BlockCache(tmp_path, 1 << 30, 2 * BLOCK, 1.0).read("s3://a/0.tar v1", 0, 4, lambda *_: b"2MiB") == b"2MiB"


def test_threads_and_processes_fetch_a_block_once(tmp_path: Path) -> None:
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(tmp_path / "cache", seed, log)) for seed in range(3)]
    for process in processes:
        process.start()
    threads = ThreadPoolExecutor(3).map(lambda seed: read_all(tmp_path / "cache", seed, log), range(3, 6))
    assert len(list(threads)) == 3
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    fetched = [int(line) for line in log.read_text().split()]
    assert sorted(fetched) == [block * BLOCK for block in range(6)]


def test_the_limit_holds_and_the_least_recently_used_are_evicted(tmp_path: Path) -> None:
    limit = 4 * (BLOCK + 200)
    cache = make_cache(tmp_path, limit)
    for block in range(4):
        cache.read("object", block * BLOCK, 1, fetch)
        # The time of a file is as coarse as the clock of the kernel.
        os.utime(newest := max(block_files(tmp_path), key=lambda path: path.stat().st_mtime), (block, block))
        assert newest.stat().st_mtime == block
    cache.read("object", 0, 1, no_fetch)
    cache.read("object", 4 * BLOCK, 1, fetch)
    assert sum(path.stat().st_size for path in block_files(tmp_path)) <= limit
    cache.read("object", 0, 1, no_fetch)
    assert cache.read("object", BLOCK, 1, fetch) == CONTENT[BLOCK : BLOCK + 1]
    assert cache.num_fetches == 6
    for offset, num_bytes in random_ranges(40):
        assert cache.read("object", offset, num_bytes, fetch) == CONTENT[offset : offset + num_bytes]
        assert sum(path.stat().st_size for path in block_files(tmp_path)) <= limit


def test_a_block_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, BLOCK)
    assert cache.read("object", 3, 9, fetch) == CONTENT[3:12]
    assert not block_files(tmp_path)


def test_what_a_dead_process_left_is_counted_or_removed(tmp_path: Path) -> None:
    make_cache(tmp_path).read("object", 0, 1, fetch)
    kept = block_files(tmp_path)[0]
    kept.with_suffix(".part").write_bytes(b"half of a bl")
    # The total is too low, as if a process had died after writing a block and before adding it to the total.
    (tmp_path / "used_bytes").write_text("0")
    cache = make_cache(tmp_path, 2 * (BLOCK + 200))
    for block in (1, 2, 3):
        cache.read("object", block * BLOCK, 1, fetch)
        assert sum(path.stat().st_size for path in block_files(tmp_path)) <= 2 * (BLOCK + 200)
    assert not list(tmp_path.glob("??/*.part"))


@pytest.mark.parametrize("part", ["page", "magic", "end", "all", "table"])
def test_a_damaged_block_is_fetched_again(tmp_path: Path, part: str, caplog) -> None:
    cache = make_cache(tmp_path)
    cache.read("object", 0, 1, fetch)
    (path,) = block_files(tmp_path)
    data = bytearray(path.read_bytes())
    match part:
        case "page":
            data[-100] ^= 1
        case "magic":
            data[0] ^= 1
        case "end":
            data = data[:-1]
        case "all":
            data.clear()
        case "table":
            data[17] ^= 1
    path.write_bytes(data)
    assert cache.read("object", 0, BLOCK, fetch) == CONTENT[:BLOCK]
    assert cache.num_fetches == 2 and "the block is damaged; fetching it again" in caplog.text
    assert cache.read("object", 0, BLOCK, no_fetch) == CONTENT[:BLOCK]


def test_no_process_waits_forever_for_one_that_hangs_while_fetching(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, patience_s=0.2)
    asked = []

    def direct(offset: int, num_bytes: int) -> bytes:
        asked.append((offset, num_bytes))
        return fetch(offset, num_bytes)

    with contextlib.ExitStack() as locks:
        for number in range(256):
            file = locks.enter_context(open(tmp_path / "locks" / str(number), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        assert cache.read("object", 5, 10, direct) == CONTENT[5:15]
        assert asked == [(5, 10)] and not block_files(tmp_path)
    assert cache.read("object", 5, 10, fetch) == CONTENT[5:15]
    assert len(block_files(tmp_path)) == 1


def test_a_failure_to_fetch_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)

    def fail(*_: int) -> bytes:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        cache.read("object", 0, 1, fail)
    assert not block_files(tmp_path)
    assert cache.read("object", 0, 1, fetch) == CONTENT[:1]


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    cache = make_cache(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for block in range(3):
        assert cache.read("object", block * BLOCK, 9, fetch) == CONTENT[block * BLOCK : block * BLOCK + 9]
    assert caplog.text.count("No space left on device") == 1
    assert not block_files(tmp_path)


def test_a_disk_that_fails_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    cache = make_cache(tmp_path / "cache")
    assert cache.read("object", 0, 9, fetch) == CONTENT[:9]

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        assert cache.read("object", 0, 9, fetch) == CONTENT[:9]
    assert "Input/output error; reading without the cache" in caplog.text
    shutil.rmtree(tmp_path / "cache")
    assert cache.read("object", 5, 9, fetch) == CONTENT[5:14]
    assert caplog.text.count("reading without the cache") == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.s3.cache_dir=.*file/cache: cannot be used \(Not a directory\)"):
        make_cache(tmp_path / "file" / "cache")
