"""Bit shards: what is in the file, that it is read back from many threads and shards, and what damage does."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from bitdance_scale.config.data_schema import DataFilter, DataSection, DataSource, Resolution
from bitdance_scale.data import bit_shards
from bitdance_scale.data.bit_shards import (
    SHARD_ROW,
    Bits,
    BitStore,
    read_tables,
    shard_file,
    shard_meta,
    write_bit_shard,
    write_table,
)
from bitdance_scale.data.checksums import checksum32
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.selection import select
from bitdance_scale.data.storage import open_files
from bitdance_scale.errors import DataError, UnreadableError
from tests.unit.data.small_data import sample_members, write_tar

RECIPE = {"num_bits": 32, "resolutions": {"64": [[64, 64]], "128": [[128, 128]]}}
META = {"format": 2, "recipe": {"resolutions": {"64": [[64, 64]]}}, "num_samples": 3}
NUM_SHARDS, NUM_SAMPLES = 6, 5


def bits_of(sample: int, side_px: int) -> Bits:
    """One byte tells the sample and the resolution; one sample is broken and one is left out at 128 px."""
    if side_px == 128 and sample in (3, 4):
        return ErrorCause.BAD_IMAGE if sample == 3 else None
    return bytes([sample, side_px]) * (side_px * side_px // 128)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    members = sample_members(64, 64, "a dog")
    paths = [
        write_tar(tmp_path / f"images/{number}.tar", {f"{number}{sample}": members for sample in range(NUM_SAMPLES)})
        for number in range(NUM_SHARDS)
    ]
    return build_index([str(path) for path in paths], tmp_path / "index")


@pytest.fixture
def folder(tmp_path: Path, index: Index) -> Path:
    folder = tmp_path / "bits"
    for row in range(NUM_SHARDS):
        resolutions = {
            side_px: [bits_of(sample, side_px) for sample in index.shard_samples(row)] for side_px in (64, 128)
        }
        write_bit_shard(folder / shard_file(row), shard_meta(index, row, RECIPE), resolutions)
    write_table(folder, index, RECIPE)
    return folder


def test_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / shard_file(7)
    write_bit_shard(path, META, {64: [b"red", ErrorCause.BAD_IMAGE, None]})
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["meta.json", "64.bits", "64.table"]
    meta, tables = read_tables(path)
    assert path.name == "000007.tar" and meta == META and list(tables) == [64]
    table = tables[64]
    bad_image = 1 + list(ErrorCause).index(ErrorCause.BAD_IMAGE)
    assert table["error_code"].tolist() == [bit_shards.HAS_BITS, bad_image, bit_shards.NOT_ENCODED]
    assert table["checksum"].tolist() == [checksum32(b"red"), checksum32(b""), checksum32(b"")]
    start, num_bytes = int(table["start"][0]), int(table["num_bytes"][0])
    assert path.read_bytes()[start : start + num_bytes] == b"red"


def test_bits_of_eight_gibibytes_have_a_header_that_is_read(tmp_path: Path) -> None:
    """Latents of large pictures in many views are as long. The bits are a hole in the file here."""
    path, num_bytes, table = tmp_path / shard_file(0), 1 << 33, np.zeros(3, SHARD_ROW)
    blocks = bytearray()
    for name, content in (("meta.json", json.dumps(META).encode()), ("64.bits", None), ("64.table", table.tobytes())):
        info = tarfile.TarInfo(name)
        info.size = num_bytes if content is None else len(content)
        header = info.tobuf(bit_shards._tar_format(num_bytes))
        assert len(header) == tarfile.BLOCKSIZE
        blocks += header + (content or b"").ljust(-(-len(content or b"") // 512) * 512, b"\0")
        if content is None:
            place = len(blocks)
    with path.open("wb") as file:
        file.write(blocks[:place])
        file.seek(num_bytes, os.SEEK_CUR)
        file.write(blocks[place:] + bytes(2 * tarfile.BLOCKSIZE))
    meta, tables = read_tables(path)
    assert meta == META and tables[64].tolist() == table.tolist()
    # One byte less has the header that it always had.
    assert bit_shards._tar_format(num_bytes - 1) == tarfile.USTAR_FORMAT


def test_only_long_bits_change_the_format_of_a_bit_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples: dict[int, list[Bits]] = {64: [b"red", b"blue", ErrorCause.BAD_IMAGE]}
    contents = []
    for limit, magic in ((8, b"ustar\x0000"), (7, b"ustar  \0")):
        monkeypatch.setattr(bit_shards, "USTAR_BYTES", limit)
        write_bit_shard(tmp_path / shard_file(0), META, samples)
        content = (tmp_path / shard_file(0)).read_bytes()
        assert content[257:265] == magic
        meta, tables = read_tables(tmp_path / shard_file(0))
        first, second, _ = tables[64]["start"].tolist()
        assert meta == META and (content[first : first + 3], content[second : second + 4]) == (b"red", b"blue")
        contents.append(content)
    assert len(contents[0]) == len(contents[1])


def test_every_sample_is_read_back(index: Index, folder: Path) -> None:
    store = BitStore(folder, index, RECIPE)
    for side_px in (64, 128):
        for sample in range(len(index)):
            expected = bits_of(sample, side_px)
            if isinstance(expected, bytes):
                found = store.read(sample, side_px)
                assert found.shape == (side_px * side_px // 256, 4) and found.dtype == np.uint8
                assert found.tobytes() == expected
    with pytest.raises(SampleError, match="when the shards were encoded") as error:
        store.read(3, 128)
    assert error.value.cause == ErrorCause.BAD_IMAGE
    with pytest.raises(DataError, match="has no bits for resolution 128 px: filters left it out"):
        store.read(4, 128)


def test_views_of_a_sample_follow_each_other(tmp_path: Path, index: Index) -> None:
    recipe = RECIPE | {"augment": {"views": 3, "mirrored": True, "flip": 0.5, "zoom": 1.25}}

    def bits_of_view(sample: int, view: int, side_px: int) -> Bits:
        return ErrorCause.BAD_IMAGE if sample == 7 else bytes([sample, view, side_px, 9]) * (side_px // 16) ** 2

    for row in range(NUM_SHARDS):
        resolutions = {
            side_px: [bits_of_view(sample, view, side_px) for sample in index.shard_samples(row) for view in range(3)]
            for side_px in (64, 128)
        }
        write_bit_shard(tmp_path / shard_file(row), shard_meta(index, row, recipe), resolutions)
    write_table(tmp_path, index, recipe)
    store = BitStore(tmp_path, index, recipe)
    for side_px in (64, 128):
        for sample in range(len(index)):
            for view in range(3):
                expected = bits_of_view(sample, view, side_px)
                if isinstance(expected, bytes):
                    assert store.read(sample, side_px, view).tobytes() == expected
        with pytest.raises(SampleError, match="when the shards were encoded"):
            store.read(7, side_px, 2)
    # A run that varies nothing, or otherwise, would find its samples at other rows.
    with pytest.raises(DataError, match="made with augment = .*'views': 3.*, now it is None. Run `bitdance encode`"):
        BitStore(tmp_path, index, RECIPE)
    other = recipe | {"augment": recipe["augment"] | {"views": 2}}
    with pytest.raises(DataError, match="made with augment = .*'views': 3.*, now it is .*'views': 2"):
        BitStore(tmp_path, index, other)


def test_bits_without_views_are_refused_where_views_are_wanted(index: Index, folder: Path) -> None:
    with pytest.raises(DataError, match="made with augment = None, now it is {'views': 2, 'mirrored': True}"):
        BitStore(folder, index, RECIPE | {"augment": {"views": 2, "mirrored": True}})


def test_entries_that_only_unusual_recipes_have_are_compared_both_ways(index: Index, folder: Path) -> None:
    table = folder / bit_shards.TABLE_NAME
    content = json.loads(table.read_text(encoding="utf-8"))
    for name, usual, value in (("order", "block", "raster"), ("latents", "bits", "continuous")):
        unusual = RECIPE | {name: value}
        with pytest.raises(DataError, match=f"made with {name} = {usual}, now it is {value}"):
            BitStore(folder, index, unusual)
        table.write_text(json.dumps(content | {"recipe": unusual}), encoding="utf-8")
        with pytest.raises(DataError, match=f"made with {name} = {value}, now it is {usual}"):
            BitStore(folder, index, RECIPE)
        table.write_text(json.dumps(content), encoding="utf-8")


def test_a_token_of_continuous_latents_has_a_float_for_each(index: Index, folder: Path) -> None:
    recipe, table = RECIPE | {"latents": "continuous", "num_bits": 2}, folder / bit_shards.TABLE_NAME
    content = json.loads(table.read_text(encoding="utf-8"))
    table.write_text(json.dumps(content | {"recipe": recipe}), encoding="utf-8")
    assert BitStore(folder, index, recipe).read(0, 64).shape == (64 * 64 // 512, 8)


def num_descriptors(folder: Path) -> int:
    """Open files in a folder."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/")
    return count


def test_threads_share_two_open_shards(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six shards, two of which may be open: reads evict each other's files all the time, and none fails."""
    monkeypatch.setattr(bit_shards, "MAX_OPEN_SHARDS", 2)
    store = BitStore(folder, index, RECIPE)
    before = num_descriptors(folder)
    begin = threading.Barrier(8)

    def read(thread: int) -> list[np.ndarray]:
        begin.wait()
        return [store.read(sample, 64) for sample in np.random.default_rng(thread).permutation(len(index)).tolist() * 9]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert num_descriptors(folder) == before + 2
    store.close()
    assert num_descriptors(folder) == before
    # The arrays outlive the files that they were read from.
    for thread, arrays in enumerate(found):
        samples = np.random.default_rng(thread).permutation(len(index)).tolist() * 9
        for sample, array in zip(samples, arrays, strict=True):
            assert array.tobytes() == bits_of(sample, 64)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, start, end: overwrite(path, start + 1, b"\xff"), "they are damaged"),
        (lambda path, start, end: os.truncate(path, end - 1), "the file ends before that"),
        (lambda path, start, end: os.truncate(path, 0), "the file ends before that"),
    ],
)
def test_damaged_bits_are_an_error_of_the_sample(
    index: Index, folder: Path, damage: Callable[[Path, int, int], None], message: str, is_open: bool
) -> None:
    """Also while the shard is open: a file that is cut short must not end the process."""
    store = BitStore(folder, index, RECIPE)
    sample, path = NUM_SAMPLES, folder / shard_file(1)
    if is_open:
        assert store.read(sample, 64).tobytes() == bits_of(sample, 64)
    row = read_tables(path)[1][64][0]
    start, end = int(row["start"]), int(row["start"]) + int(row["num_bytes"])
    damage(path, start, end)
    with pytest.raises(SampleError, match=f"{path}, bytes {start}..{end}: {message}") as error:
        store.read(sample, 64)
    assert error.value.cause == ErrorCause.READ_FAILED
    # Other shards are as they were.
    assert store.read(0, 64).tobytes() == bits_of(0, 64)


def test_a_missing_shard_is_an_error_of_its_samples(index: Index, folder: Path) -> None:
    store = BitStore(folder, index, RECIPE)
    (folder / shard_file(2)).unlink()
    with pytest.raises(SampleError, match="000002.tar, bytes .*No such file") as error:
        store.read(2 * NUM_SAMPLES, 64)
    assert error.value.cause == ErrorCause.READ_FAILED


def test_a_shard_that_fails_for_a_moment_is_opened_again(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read, failed = BitStore(folder, index, RECIPE), os.pread, []
    monkeypatch.setattr(open_files, "PAUSES_S", (0.0, 0.0))
    assert store.read(0, 64).tobytes() == bits_of(0, 64)

    def read_later(descriptor: int, num_bytes: int, start: int) -> bytes:
        if len(failed) < 2:
            failed.append(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(descriptor, num_bytes, start)

    monkeypatch.setattr(os, "pread", read_later)
    assert store.read(0, 64).tobytes() == bits_of(0, 64)
    failed[:] = []
    monkeypatch.setattr(open_files, "PAUSES_S", (0.0,))
    with pytest.raises(SampleError, match="000000.tar, bytes .*Stale file handle") as error:
        store.read(0, 64)
    assert error.value.cause == ErrorCause.READ_FAILED


@pytest.mark.parametrize(
    ("field", "value"),
    [("start", -1), ("start", 2**40), ("num_bytes", 2**31), ("num_bytes", 3), ("checksum", 0), ("shard", 99)],
)
def test_a_damaged_row_of_the_table_is_an_error_of_its_sample(
    index: Index, folder: Path, field: str, value: int
) -> None:
    table = np.load(folder / "64.table.npy", mmap_mode="r+")
    table[field][7] = value
    table.flush()
    store = BitStore(folder, index, RECIPE)
    with pytest.raises(SampleError) as error:
        store.read(7, 64)
    assert error.value.cause == ErrorCause.READ_FAILED
    assert store.read(8, 64).tobytes() == bits_of(8, 64)


@pytest.mark.parametrize("damage", ["shorter", "of another type", "cut", "missing"])
def test_a_damaged_table_is_refused(index: Index, folder: Path, damage: str) -> None:
    path = folder / "64.table.npy"
    table = np.load(path)
    if damage == "shorter":
        np.save(path, table[:-1])
    elif damage == "of another type":
        np.save(path, table["start"])
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"64.table.npy: the table .*Run `bitdance encode` again"):
        BitStore(folder, index, RECIPE)


def test_a_table_that_is_written_again_stays_whole_for_a_running_job(index: Index, folder: Path) -> None:
    store = BitStore(folder, index, RECIPE)
    shard = folder / shard_file(5)
    kept = shard.read_bytes()
    shard.write_bytes(b"half a shard")
    with pytest.raises(DataError, match=r"000005.tar: no usable bit shard"):
        write_table(folder, index, RECIPE)
    assert store.read(7, 64).tobytes() == bits_of(7, 64)
    # Nothing begins to train on a table that is not complete.
    with pytest.raises(DataError, match="no bits are there"):
        BitStore(folder, index, RECIPE)
    shard.write_bytes(kept)
    write_table(folder, index, RECIPE)
    assert store.read(7, 64).tobytes() == BitStore(folder, index, RECIPE).read(7, 64).tobytes()
    assert not list(folder.glob("*.writing"))


@pytest.fixture
def wide(make_config) -> DataSection:
    """All 12 pictures at 64 px, six in a shard, of aspects 1 to 1.5 and with scores 0 to 5."""
    return make_config(resolutions=(Resolution(side_px=64, share=1, buckets_px=((64, 64),)),)).data


@pytest.fixture
def pictures(tmp_path: Path) -> Index:
    shards = [
        {
            f"{shard}{number}": sample_members(64, 64 + 6 * number, "a dog") | {"json": b'{"score": %d}' % number}
            for number in range(6)
        }
        for shard in range(2)
    ]
    paths = [str(write_tar(tmp_path / f"pictures/{number}.tar", shard)) for number, shard in enumerate(shards)]
    return build_index(paths, tmp_path / "pictures_index")


def with_filters(data: DataSection, **bounds: float) -> DataSection:
    """The data with filters of largest values."""
    filters = tuple(DataFilter(column=column, max=value) for column, value in bounds.items())
    return dataclasses.replace(data, filters=filters)


def encode(folder: Path, index: Index, data: DataSection, recipe: dict) -> None:
    """Makes bit shards with as many bits as `data` draws."""
    drawn = select(index, data).eligible[0, 64].contains(np.arange(len(index)))
    num_views = bit_shards.recipe_views(recipe)
    for row in range(len(index.shards)):
        samples: list[Bits] = [
            b"bits" if drawn[sample] else None for sample in index.shard_samples(row) for _ in range(num_views)
        ]
        write_bit_shard(folder / shard_file(row), shard_meta(index, row, recipe), {64: samples})
    write_table(folder, index, recipe, bit_shards.stored_filters(index, data))


@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("samples_at_once", [1, 4, 100])
def test_bits_that_lack_what_filters_keep_now_are_refused_at_the_start(
    pictures: Index, wide: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_views: int, samples_at_once
) -> None:
    monkeypatch.setattr(bit_shards, "_SAMPLES_AT_ONCE", samples_at_once)
    recipe = {"num_bits": 32, "resolutions": {"64": [[64, 64]]}}
    recipe |= {"augment": {"views": num_views}} if num_views > 1 else {}
    # Samples 0 to 3 of each shard; and 0 to 4.
    narrow, middle = with_filters(wide, aspect=1.3, score=9), with_filters(wide, score=4)
    encode(tmp_path, pictures, narrow, recipe)
    store = BitStore(tmp_path, pictures, recipe)
    for fitting in (narrow, with_filters(wide, score=3), with_filters(wide, aspect=1.2)):
        store.check_drawn(fitting)
    refusal = (
        rf"{tmp_path}/bits.json: %s samples that are drawn at 64 px were left out when the shards were encoded, the "
        r"first is 04 of .*/0.tar. data.filters were \['-inf <= aspect <= 1.3, missing: drop', .*\] then and are %s now"
        r". Run `bitdance encode` with this configuration, .*, or restore the filters"
    )
    with pytest.raises(DataError, match=refusal % ("4 of the 12", r"\[\]")):
        store.check_drawn(wide)
    with pytest.raises(DataError, match=refusal % ("2 of the 10", r"\['-inf <= score <= 4, missing: drop'\]")):
        store.check_drawn(middle)


def test_bits_of_the_same_filters_are_not_searched(
    pictures: Index, wide: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the scores are others, which change no image and so no index hash."""
    data, recipe = with_filters(wide, score=3), {"num_bits": 32, "resolutions": {"64": [[64, 64]]}}
    encode(tmp_path, pictures, data, recipe)
    with monkeypatch.context() as patch:
        patch.delattr(bit_shards, "select")
        BitStore(tmp_path, pictures, recipe).check_drawn(data)
    members = sample_members(64, 64, "a dog")
    scores = [{f"{n}{m}": members | {"json": b'{"score": %d}' % (5 - m)} for m in range(6)} for n in range(2)]
    others = build_index([str(write_tar(tmp_path / f"{n}.tar", scores[n])) for n in range(2)], tmp_path / "others")
    others.hash = pictures.hash
    with pytest.raises(DataError, match="4 of the 8 samples .*, the first is 04 of"):
        BitStore(tmp_path, others, recipe).check_drawn(data)


def test_bits_of_earlier_versions_do_not_say_their_filters(pictures: Index, wide: DataSection, tmp_path: Path) -> None:
    recipe, narrow = {"num_bits": 32, "resolutions": {"64": [[64, 64]]}}, with_filters(wide, score=3)
    encode(tmp_path, pictures, narrow, recipe)
    table = json.loads((tmp_path / bit_shards.TABLE_NAME).read_text())
    del table["filters"]
    (tmp_path / bit_shards.TABLE_NAME).write_text(json.dumps(table))
    store = BitStore(tmp_path, pictures, recipe)
    store.check_drawn(narrow)
    with pytest.raises(DataError, match=r"data.filters were not stored then and are \[\] now"):
        store.check_drawn(wide)


def test_filters_of_one_source_are_not_those_of_another(pictures: Index, wide: DataSection, tmp_path: Path) -> None:
    index, recipe = pictures.divided([1, 1]), {"num_bits": 32, "resolutions": {"64": [[64, 64]]}}
    sources = tuple(DataSource(name=name, shards=(name,), share=1) for name in ("a", "b"))
    data = {
        name: dataclasses.replace(wide, sources=sources, filters=(DataFilter(column="score", max=3, source=name),))
        for name in ("a", "b")
    }
    eligible = select(index, data["a"]).eligible
    for row in range(2):
        drawn = eligible[row, 64].contains(np.arange(6)).tolist()
        bits: list[Bits] = [b"bits" if is_drawn else None for is_drawn in drawn]
        write_bit_shard(tmp_path / shard_file(row), shard_meta(index, row, recipe), {64: bits})
    write_table(tmp_path, index, recipe, bit_shards.stored_filters(index, data["a"]))
    store = BitStore(tmp_path, index, recipe)
    store.check_drawn(data["a"])
    with pytest.raises(DataError, match="2 of the 6 samples .*, the first is 04 of .*/0.tar"):
        store.check_drawn(data["b"])


def test_other_formats_are_refused(index: Index, folder: Path, tmp_path: Path) -> None:
    table = json.loads((folder / bit_shards.TABLE_NAME).read_text())
    (folder / bit_shards.TABLE_NAME).write_text(json.dumps(table | {"format": 1}))
    with pytest.raises(DataError, match=r"bits of format 1; this version reads 2.*Run `bitdance encode`"):
        BitStore(folder, index, RECIPE)
    path = tmp_path / shard_file(0)
    write_bit_shard(path, META | {"format": 1}, {})
    with pytest.raises(DataError, match=r"format 1; this version reads 2. Delete it and run `bitdance encode` again"):
        read_tables(path)


def test_a_file_that_is_not_a_bit_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"half a shard")
    with pytest.raises(DataError, match="no usable bit shard.*Delete it and run `bitdance encode` again"):
        read_tables(tmp_path / "0.tar")
    write_bit_shard(tmp_path / "1.tar", META, {64: [b"red"]})
    with pytest.raises(DataError, match="a table has not the 3 samples of the shard"):
        read_tables(tmp_path / "1.tar")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_bits_that_cannot_be_read_now_are_no_damage(index: Index, folder: Path, monkeypatch, code: int) -> None:
    """Nobody is told to delete them, or that there are none."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    calls: list[tuple[str, Callable[[], object]]] = [
        ("tarfile.open", lambda: read_tables(folder / shard_file(0))),
        ("pathlib.Path.read_text", lambda: BitStore(folder, index, RECIPE)),
        ("numpy.load", lambda: BitStore(folder, index, RECIPE)),
    ]
    for name, call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            message = f"{folder}/.*cannot be read now .{os.strerror(code)}.; it stays as it is"
            with pytest.raises(UnreadableError, match=message) as found:
                call()
        assert ("name another folder (data.bits_dir)" in str(found.value)) == (code == errno.EACCES)
        assert "encode" not in str(found.value)
        call()


def test_a_row_of_the_table_is_small() -> None:
    """The tables of 2e9 samples at three resolutions then take 150 GB, and a lookup one page."""
    assert SHARD_ROW.itemsize == 17 and bit_shards.ROW.itemsize == 21
