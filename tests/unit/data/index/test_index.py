"""The index: what it holds, and what its hash covers."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image

from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import default_index_dir, find_table, open_index
from tests.unit.data.small_data import sample_members, write_tar


def test_holds_every_sample(data_set: list[str], tmp_path: Path) -> None:
    index = build_index(data_set, tmp_path)
    assert len(index) == 21
    assert [entry.num_samples for entry in index.shards] == [7, 5, 9]
    for sample in range(len(index)):
        with open(index.shard_path(sample), "rb") as file:
            file.seek(index.place(sample).offset)
            picture = Image.open(io.BytesIO(file.read(index.place(sample).num_bytes)))
        assert (picture.height, picture.width) == index.size_px(sample)
        assert index.name(sample) == f"{sample:09d}"
        assert index.caption(sample) == ("red circle " * (sample % 7 + 1)).strip()
    assert index.errors() == {}


def test_the_hash_covers_the_data_and_not_their_place(data_set: list[str], tmp_path: Path) -> None:
    here = [shutil.copy2(path, tmp_path) for path in data_set]
    index = build_index(here, default_index_dir(here))
    assert build_index(data_set, tmp_path / "elsewhere").hash == index.hash
    assert build_index(data_set[::-1], tmp_path / "elsewhere").hash != index.hash
    (tmp_path / "moved").mkdir()
    for path in [*here, default_index_dir(here)]:
        shutil.move(path, tmp_path / "moved")
    there = [str(tmp_path / "moved" / Path(path).name) for path in here]
    moved = open_index(find_table(Path(default_index_dir(there)), there).path)
    assert moved.shard_path(0) == there[0]
    assert build_index(there, default_index_dir(there)).table == moved.table


def test_hash_covers_captions_and_sizes(tmp_path: Path) -> None:
    """Tars of equal length that differ only in a caption or a size: the digests differ too."""
    base = sample_members(20, 30, "red")
    changed = [base, base | {"txt": b"tan"}, base | {"json": base["json"].replace(b"30", b"31")}]
    hashes = []
    for number, members in enumerate(changed):
        shard = write_tar(tmp_path / f"{number}.tar", {"0": members})
        index = build_index([str(shard)], tmp_path / f"index_{number}")
        hashes.append((index.hash, index.digests["caption.caption"]))
    assert len({path.stat().st_size for path in tmp_path.glob("*.tar")}) == 1
    (base, caption), same, other = hashes
    assert same[0] == base != other[0] and same[1] != caption


def test_equal_file_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    shards = [
        str(write_tar(tmp_path / name / "00000.tar", {"0": sample_members(16, 16 + size, name)}))
        for size, name in enumerate(("a", "b"))
    ]
    index = build_index(shards, tmp_path / "index")
    assert [index.caption(sample) for sample in range(2)] == ["a", "b"]
    assert [index.shard_path(sample) for sample in range(2)] == shards
