"""One index folder for many lists of shards: each keeps its index, and what is known of a shard is known to all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance_scale.data.index import build, known_shards, verification
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import EARLIER_TABLE, table_paths
from tests.unit.data.index.test_build import contents, many_shards


def test_each_list_keeps_its_index(tmp_path: Path, monkeypatch, scanned: list[str]) -> None:
    """A run, the shards that it holds out, a trial on some of its tars: none reads again because of another."""
    monkeypatch.setattr(build, "MIN_SEGMENT_SAMPLES", 12)
    shards, held_out = many_shards(tmp_path, 12), many_shards(tmp_path / "held_out", 2, 50)
    lists = {"run": shards, "held out": held_out, "trial": shards[3:5], "all": [*shards, *held_out]}
    built = {name: build_index(paths, tmp_path / "index") for name, paths in lists.items()}
    assert scanned == [*shards, *held_out]
    fresh = {name: contents(build_index(paths, tmp_path / name)) for name, paths in lists.items()}
    scanned.clear()
    compared: list[Path] = []
    monkeypatch.setattr(verification, "digests_of", lambda path: compared.append(path) or {})
    files = {path.name: path.stat().st_ino for path in (tmp_path / "index").glob("segment_*")}
    for name, paths in [*lists.items(), *lists.items()]:
        again = build_index(paths, tmp_path / "index")
        assert again.table == built[name].table and contents(again) == fresh[name]
    assert not scanned and not compared
    assert files == {path.name: path.stat().st_ino for path in (tmp_path / "index").glob("segment_*")}


def test_a_shard_that_has_changed_is_scanned_once_for_all_lists(tmp_path: Path, scanned: list[str]) -> None:
    shards = many_shards(tmp_path, 6)
    for paths in (shards, shards[2:4]):
        build_index(paths, tmp_path / "index")
    os.utime(shards[3], ns=(1, 1))
    scanned.clear()
    for paths in (shards[2:4], shards, shards[::-1]):
        index = build_index(paths, tmp_path / "index")
        assert contents(index) == contents(build_index(paths, tmp_path / f"fresh_{paths[0][-5]}"))
    assert scanned.count(shards[3]) == 1 + 3 and scanned.count(shards[2]) == 3


def test_captions_that_another_list_lacks_are_scanned(tmp_path: Path, scanned: list[str]) -> None:
    shards = many_shards(tmp_path, 4)
    build_index(shards, tmp_path / "index", captions=["caption", "json:key"])
    build_index(shards[:2], tmp_path / "index", captions=["json:status"])
    scanned.clear()
    few = build_index(shards[1:3], tmp_path / "index", captions=["json:key"])
    assert not scanned and few.captions == ("json:key",)
    assert contents(few) == contents(build_index(shards[1:3], tmp_path / "fresh", captions=["json:key"]))
    scanned.clear()
    assert build_index(shards[1:3], tmp_path / "index", captions=["json:status"]).captions == (
        "json:key",
        "json:status",
    )
    assert scanned == shards[1:3]


def test_the_index_of_an_earlier_version_is_read(tmp_path: Path, scanned: list[str]) -> None:
    """The folder has one table, whose name does not say which shards it is of."""
    shards = many_shards(tmp_path, 6)
    index = build_index(shards[:4], tmp_path / "index")
    index.table.rename(tmp_path / "index" / EARLIER_TABLE)
    scanned.clear()
    again = build_index(shards[:4], tmp_path / "index")
    assert not scanned and again.table.name == EARLIER_TABLE and contents(again) == contents(index)
    grown = build_index(shards, tmp_path / "index")
    assert scanned == shards[4:] and contents(grown) == contents(build_index(shards, tmp_path / "fresh"))
    scanned.clear()
    for paths in (shards[:4], shards):
        build_index(paths, tmp_path / "index")
    assert not scanned


def test_a_stopped_build_goes_on_after_that_of_another_list(tmp_path: Path, monkeypatch) -> None:
    shards, others = many_shards(tmp_path, 3), many_shards(tmp_path / "others", 2, 50)
    counted: list[object] = []
    scan = build.scan_shard

    def scan_two(*given: object) -> object:
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(given)
        return scan(*given)

    monkeypatch.setattr(build, "scan_shard", scan_two)
    with pytest.raises(KeyboardInterrupt):
        build_index(shards, tmp_path / "index")
    counted.clear()
    build_index(others, tmp_path / "index")
    counted.clear()
    assert len(build_index(shards, tmp_path / "index")) == 9
    assert len(counted) == 1 and not (tmp_path / "index" / ".parts").exists()


def test_jobs_that_index_different_lists_together(tmp_path: Path) -> None:
    """Every shard is scanned by one of them, and the ranks of both find the index that their job has built."""
    many_shards(tmp_path, 12)
    script = f"""
import glob, sys, time
from bitdance_scale.data.index import build
from bitdance_scale.data.index.index import open_index
scan = build.scan_shard
build.scan_shard = lambda *args: time.sleep(0.1) or print("scanned", flush=True) or scan(*args)
shards = sorted(glob.glob({str(tmp_path)!r} + "/*.tar"))[int(sys.argv[1]) : int(sys.argv[2])]
index = build.build_index(shards, {str(tmp_path)!r} + "/index")
# Until the other has built, too.
time.sleep(2)
assert open_index(index.table).hash == index.hash
print(len(index))
"""
    jobs = [
        subprocess.Popen([sys.executable, "-c", script, *part], stdout=subprocess.PIPE, text=True)
        for part in (("0", "8"), ("4", "12"))
    ]
    outputs = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert [output[-1] for output in outputs] == ["24", "24"]
    assert sum(output.count("scanned") for output in outputs) == 12


def test_an_index_that_is_whole_waits_for_no_builder(tmp_path: Path, monkeypatch) -> None:
    shards = many_shards(tmp_path, 2)
    index = build_index(shards, tmp_path / "index")
    monkeypatch.setattr(build.fcntl, "flock", lambda *_: pytest.fail("waited"))
    assert build_index(shards, tmp_path / "index").hash == index.hash


def test_the_tables_that_cost_least_are_dropped(tmp_path: Path, monkeypatch, scanned: list[str]) -> None:
    monkeypatch.setattr(known_shards, "MAX_TABLES", 3)
    shards, held_out = many_shards(tmp_path, 6), many_shards(tmp_path / "held_out", 1, 50)
    kept = {build_index(paths, tmp_path / "index").table for paths in (shards, held_out)}
    for shard in shards:
        build_index([shard], tmp_path / "index")
    # Somebody may be about to open them.
    assert len(table_paths(tmp_path / "index")) == 2 + 6
    for table in table_paths(tmp_path / "index"):
        os.utime(table, ns=(1, 1))
    newest = build_index(shards[1:3], tmp_path / "index").table
    assert set(table_paths(tmp_path / "index")) == {*kept, newest}
    for paths in (shards, held_out):
        build_index(paths, tmp_path / "index")
    assert scanned == [*shards, *held_out]
