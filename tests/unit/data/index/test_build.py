"""Building the index: only what is new or has changed, in parallel, and resumable."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from bitdance_scale.atomic_files import WRITING
from bitdance_scale.data.index import build, verification
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index, open_index, read_table
from bitdance_scale.data.index.verification import find_damage
from bitdance_scale.errors import DataError, UnreadableError
from tests.unit.data.small_data import sample_members, write_tar


def contents(index: Index) -> list[object]:
    """All that an index says of its samples, however it is divided into segments."""
    every, samples = slice(None), np.arange(len(index))
    values = [index.sizes_px(every), index.original_sizes_px(every), index.places(every)]
    values += [index.score(field) for field in index.scores]
    texts = [index.texts(source, samples) for source in index.captions]
    names, paths = ([of(sample) for sample in range(len(index))] for of in (index.name, index.shard_path))
    return [*(column.tolist() for column in values), *texts, names, paths, index.digests, index.hash]


def test_is_built_once_and_only_changed_shards_are_read(data_set: list[str], tmp_path: Path, scanned) -> None:
    shards = [shutil.copy2(path, tmp_path) for path in data_set]
    first = build_index(shards[:2], tmp_path / "index")
    assert scanned == shards[:2]
    assert build_index(shards[:2], tmp_path / "index").hash == first.hash
    assert scanned == shards[:2]
    grown = build_index(shards, tmp_path / "index")
    assert scanned == shards
    fresh = build_index(shards, tmp_path / "other")
    assert grown.hash == fresh.hash != first.hash
    assert contents(grown) == contents(fresh)
    os.utime(shards[1], ns=(1, 1))
    scanned.clear()
    assert build_index(shards, tmp_path / "index").hash == fresh.hash
    assert scanned == [shards[1]]


def test_refusals(data_set: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.tar: cannot open the shard"):
        build_index([*data_set, str(tmp_path / "gone.tar")], tmp_path / "index")
    empty = str(write_tar(tmp_path / "text_only.tar", {"0": {"txt": b"a"}}))
    with pytest.raises(DataError, match="no usable image in 1 shards.*missing_image"):
        build_index([empty], tmp_path / "index")
    with pytest.raises(DataError, match="no usable index.*Delete"):
        open_index(tmp_path / "index" / "index.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the index.*Set data.index_dir"):
        build_index(data_set, tmp_path / "file")
    table = build_index(data_set, tmp_path / "index").table
    next((tmp_path / "index").glob("segment_*")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="segment_.*: 7 bytes, it was written with .* reads the shards of this segment"):
        open_index(table)
    with pytest.raises(DataError, match="no usable index.*Delete"):
        open_index(table, is_verified=True)
    table.write_text(json.dumps(json.loads(table.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="format 99, this version reads 3"):
        open_index(table)


def test_a_failed_build_leaves_the_old_index(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    old = build_index(data_set[:1], tmp_path / "index")
    monkeypatch.setattr(build, "join_pieces", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(DataError, match="no space left"):
        build_index(data_set, tmp_path / "index")
    assert open_index(old.table).hash == old.hash
    assert not list((tmp_path / "index").glob(f"*{WRITING}"))


def test_a_stopped_build_goes_on_where_it_was(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    """What was scanned before the stop is kept and not scanned again."""
    scanned = []
    scan = build.scan_shard

    def scan_two(read, *rest):
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(read)
        return scan(read, *rest)

    monkeypatch.setattr(build, "scan_shard", scan_two)
    with pytest.raises(KeyboardInterrupt):
        build_index(data_set, tmp_path / "index")
    scanned.clear()
    index = build_index(data_set, tmp_path / "index")
    assert len(scanned) == 1
    monkeypatch.undo()
    whole = build_index(data_set, tmp_path / "whole")
    assert index.hash == whole.hash and index.digests == whole.digests
    assert not list((tmp_path / "index" / ".parts").glob("*"))


def test_processes_build_the_same(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    alone = build_index(data_set, tmp_path / "alone")
    monkeypatch.setattr(build, "MIN_SEGMENT_SAMPLES", 8)
    seen = []
    index = build_index(data_set, tmp_path / "index", num_workers=2, progress=lambda entry: seen.append(entry.path))
    assert sorted(seen) == sorted(data_set)
    assert index.hash == alone.hash and index.digests == alone.digests
    assert contents(index) == contents(alone)


def test_an_index_that_cannot_be_read_is_built_again(data_set: list[str], tmp_path: Path, caplog) -> None:
    whole = build_index(data_set, tmp_path / "index")
    table = json.loads(whole.table.read_text())
    for content in (json.dumps(table | {"format": 1}), "{"):
        whole.table.write_text(content)
        assert build_index(data_set, tmp_path / "index").hash == whole.hash
    assert "format 1, this version reads 3" in caplog.text and "no other table knows are read again" in caplog.text


def many_shards(folder: Path, count: int, number: int = 0, num_samples: int = 3) -> list[str]:
    return [
        str(
            write_tar(
                folder / f"{n:03d}.tar",
                {f"{n}_{k}": sample_members(16, 16 + n, f"{n} {k}", n) for k in range(num_samples)},
            )
        )
        for n in range(number, number + count)
    ]


def segment_files(table: Path) -> dict[str, int]:
    """Segments that a table names, with the inode of each, which shows whether it was written again."""
    return {entry.file: os.stat(table.parent / entry.file).st_ino for entry in read_table(table).segments}


def test_a_change_costs_its_own_segment(tmp_path: Path, monkeypatch) -> None:
    """A shard is changed, added in the middle, removed, moved to the end: the index is that of a fresh build."""
    monkeypatch.setattr(build, "MIN_SEGMENT_SAMPLES", 12)
    shards = many_shards(tmp_path, 24)
    table = build_index(shards, tmp_path / "index").table
    assert len(segment_files(table)) == 6
    write_tar(Path(shards[9]), {"9": sample_members(32, 32, "another")})
    extra = many_shards(tmp_path / "extra", 1, 50)
    changes = {
        "changed": (shards, 5),
        "added": ([*shards[:6], *extra, *shards[6:]], 4),
        "removed": (shards[:20] + shards[21:], 4),
        "moved": ([*shards[4:], *shards[:4]], 5),
        "reversed": (shards[::-1], 0),
    }
    for name, (changed, num_kept) in changes.items():
        shutil.copytree(tmp_path / "index", tmp_path / name)
        kept = segment_files(tmp_path / name / table.name)
        index = build_index(changed, tmp_path / name)
        after = segment_files(index.table)
        assert len(kept.items() & after.items()) >= num_kept, name
        assert contents(index) == contents(build_index(changed, tmp_path / f"fresh_{name}")), name


def test_needs_few_descriptors(tmp_path: Path) -> None:
    """With room for 160 open files, 250 shards are scanned in two builds, and joined into segments."""
    many_shards(tmp_path, 250, num_samples=1)
    script = f"""
import glob, resource
from bitdance_scale.data.index import build, verification
build.MIN_SEGMENT_SAMPLES = 60
shards = sorted(glob.glob({str(tmp_path)!r} + "/*.tar"))
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
scan = build.scan_shard
def stop_early(*args):
    stop_early.count += 1
    if stop_early.count > 200:
        raise KeyboardInterrupt
    return scan(*args)
stop_early.count = 0
build.scan_shard = stop_early
try:
    build.build_index(shards, {str(tmp_path)!r} + "/index")
except KeyboardInterrupt:
    pass
build.scan_shard = scan
index = build.build_index(shards, {str(tmp_path)!r} + "/index")
assert len(index) == 250 and index.caption(249) == "249 0", len(index)
print("built")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "built\n", done.stderr


def test_too_many_open_files_are_no_damage(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    """The message names the limit, and what has been scanned stays."""
    monkeypatch.setattr(
        build, "join_pieces", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files"))
    )
    with pytest.raises(DataError, match="Too many open files.*Raise the limit .`ulimit -n`"):
        build_index(data_set, tmp_path / "index")
    assert len(list((tmp_path / "index" / ".parts").glob("*.safetensors"))) == 3
    monkeypatch.undo()
    build_index(data_set, tmp_path / "index")


WAYS_OUT = {
    errno.EIO: "Start again when the storage answers",
    errno.ESTALE: "Start again when the storage answers",
    errno.EACCES: r"Let its owner make it readable for you, or name another folder \(data.index_dir\)",
    errno.EMFILE: "Raise the limit .`ulimit -n`. and start again",
}


@pytest.mark.parametrize("place", ["folder", "table", "table of another list", "checked segment", "mapped segment"])
@pytest.mark.parametrize("code", WAYS_OUT)
def test_a_file_that_cannot_be_read_now_is_no_damage(
    data_set: list[str], tmp_path: Path, monkeypatch, scanned: list[str], code: int, place: str
) -> None:
    """Nothing is scanned again or replaced because of it, and nobody is told to delete what may be whole."""
    shards, index_dir = [shutil.copy2(path, tmp_path) for path in data_set], tmp_path / "index"
    other = build_index(shards[:2], index_dir).table.name
    index = build_index(shards, index_dir)
    needs_scan = place not in ("folder", "table")
    if needs_scan:
        # Before a shard has changed, nothing is needed but the table and the lengths of its segments.
        os.utime(shards[2], ns=(1, 1))
    if place == "checked segment":
        for path in index_dir.glob("segment_*"):
            os.utime(path, ns=(1, 1))

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in index_dir.iterdir()}

    def fail(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    scanned.clear()
    before, read_bytes = files(), Path.read_bytes
    failing = {"table": index.table.name, "table of another list": other}.get(place)
    message = f"{index_dir}.*cannot be read now .{os.strerror(code)}.; it stays as it is. {WAYS_OUT[code]}"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: fail() if path.name == failing else read_bytes(path))
        if place == "folder":
            patch.setattr("bitdance_scale.data.index.index.os.listdir", fail)
        if place == "checked segment":
            patch.setattr(verification, "digests_of", fail)
        if place == "mapped segment":
            patch.setattr("bitdance_scale.data.index.index.Segment.of_file", fail)
        with pytest.raises(UnreadableError, match=message):
            build_index(shards, index_dir)
        if place not in ("folder", "table of another list"):
            with pytest.raises(UnreadableError, match=message):
                open_index(index.table)
    assert not scanned and files() == before
    assert build_index(shards, index_dir).hash == index.hash
    assert scanned == shards[2:] * needs_scan


def test_damage_that_the_file_system_does_not_show_is_not_forgotten(data_set, tmp_path: Path, monkeypatch) -> None:
    """Once a whole comparison has found it, the segment does not count as what was written."""
    table = build_index(data_set, tmp_path / "index").table
    segments = read_table(table).segments
    with monkeypatch.context() as patch:
        patch.setattr(verification, "digests_of", lambda path: {})
        assert not find_damage(table.parent, segments)
        assert len(find_damage(table.parent, segments, is_whole=True)) == 1
        assert len(find_damage(table.parent, segments)) == 1
    assert not find_damage(table.parent, segments)


@pytest.mark.parametrize(
    "column", ["header", "place", "size_px", "caption.caption.text", "caption.caption.start", "name.base"]
)
def test_an_overwritten_column_is_found_and_mended(data_set: list[str], tmp_path: Path, caplog, column: str) -> None:
    """Even if the time of the last change is set back. The shards of the segment are read again."""
    index = build_index(data_set, tmp_path / "index")
    whole = contents(index)
    path = next((tmp_path / "index").glob("segment_*"))
    stat, place = path.stat(), 12 if column == "header" else place_of(path, column)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=f"{path.name}: its column {column} is not what was written .*reads the shards"):
        open_index(index.table)
    assert contents(build_index(data_set, tmp_path / "index")) == whole
    assert f"its column {column} is not what was written" in caplog.text and "reading its 3 shards again" in caplog.text
    open_index(index.table)


def place_of(path: Path, column: str) -> int:
    """A byte of a column in a segment file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + json.loads(file.read(length))[column]["data_offsets"][0] + 2


def test_a_copied_index_is_compared_once(data_set: list[str], tmp_path: Path, monkeypatch) -> None:
    table = build_index(data_set, tmp_path / "index").table
    shutil.copytree(tmp_path / "index", tmp_path / "copy")
    copy = tmp_path / "copy" / table.name
    compared = []
    digests_of = verification.digests_of
    monkeypatch.setattr(verification, "digests_of", lambda path: compared.append(path.name) or digests_of(path))
    open_index(table)
    assert not compared
    open_index(copy)
    open_index(copy)
    assert len(compared) == 1
    find_damage(copy.parent, read_table(copy).segments, is_whole=True)
    assert len(compared) == 2


def test_a_changed_shard_is_named_with_its_bytes(data_set: list[str], tmp_path: Path, caplog) -> None:
    """It is read again because its time has changed; nobody should train on it without having been told."""
    shards = [shutil.copy2(path, tmp_path) for path in data_set]
    index = build_index(shards, tmp_path / "index")
    os.utime(shards[0], ns=(1, 1))
    build_index(shards, tmp_path / "index")
    assert "has changed" not in caplog.text
    place = index.place(8)
    content = bytearray(Path(shards[1]).read_bytes())
    content[place.offset + 50] ^= 1
    Path(shards[1]).write_bytes(content)
    changed = build_index(shards, tmp_path / "index")
    expected = (
        f"{shards[1]}: has changed since it was indexed: 1 of its 5 images are no longer the same, the first in bytes "
        f"{place.offset - 512}..{place.offset + place.num_bytes}; now it has 5"
    )
    assert expected in caplog.text and changed.hash != index.hash


def test_jobs_that_start_together_wait_for_one_another(tmp_path: Path) -> None:
    """The first builds, the others open what it has built; none finds the index half done."""
    many_shards(tmp_path, 12)
    script = f"""
import glob, time
from bitdance_scale.data.index import build
scan = build.scan_shard
build.scan_shard = lambda *args: time.sleep(0.1) or print("scanned", flush=True) or scan(*args)
print(build.build_index(sorted(glob.glob({str(tmp_path)!r} + "/*.tar")), {str(tmp_path)!r} + "/index").hash)
"""
    jobs = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert len({output[-1] for output in outputs}) == 1
    assert sum(output.count("scanned") for output in outputs) == 12


def test_a_damaged_part_is_scanned_again(data_set: list[str], tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(build, "join_pieces", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(DataError, match="no space left"):
        build_index(data_set, tmp_path / "index")
    monkeypatch.undo()
    part = next((tmp_path / "index" / ".parts").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[place_of(part, "place")] ^= 1
    part.write_bytes(content)
    assert contents(build_index(data_set, tmp_path / "index")) == contents(build_index(data_set, tmp_path / "whole"))
    assert f"{part}: a part that an earlier build left cannot be used" in caplog.text
