"""`bitdance index --verify` names what has changed in shards since they were indexed."""

from __future__ import annotations

import shutil
from pathlib import Path

from bitdance_scale.cli.index_shards import main
from bitdance_scale.data.index.build import build_index
from tests.unit.data.small_data import sample_members, write_tar


def test_every_changed_image_is_named(data_set: list[str], tmp_path: Path, capsys) -> None:
    """One bit of every image of a shard, another caption, a cut shard, a shard that is gone."""
    extra = str(write_tar(tmp_path / "3.tar", {"0": sample_members(16, 16, "red")}))
    shards = [*(shutil.copy2(path, tmp_path) for path in data_set), extra]
    index = build_index(shards, tmp_path / "index")
    arguments = [str(tmp_path), "--index-dir", str(tmp_path / "index"), "--verify"]
    assert main(arguments) == 0
    assert "22 images in 4 shards compared; 0 shards have changed" in capsys.readouterr().out
    content = bytearray(Path(shards[0]).read_bytes())
    for sample in range(7):
        content[index.place(sample).offset + 100] ^= 1
    Path(shards[0]).write_bytes(content)
    Path(extra).write_bytes(Path(extra).read_bytes().replace(b"red", b"tan"))
    content = Path(shards[2]).read_bytes()
    Path(shards[2]).write_bytes(content[: index.place(20).offset - 512])
    assert main([*arguments, "--workers", "2"]) == 1
    out = capsys.readouterr().out.splitlines()
    places = [index.place(sample) for sample in range(7)]
    for place in places:
        begin, end = place.offset - 512, place.offset + place.num_bytes
        assert f"{shards[0]}: bytes {begin}..{end}: not the image that was indexed" in out
    assert f"{extra}: captions caption: not those that were indexed" in out
    last = index.place(20)
    assert (
        f"{shards[2]}: bytes {last.offset - 512}..{last.offset + last.num_bytes}: not the image that was indexed" in out
    )
    assert out[-1] == "22 images in 4 shards compared; 3 shards have changed"
    # Of the folder as it is there is no index; that of the folder as it was has most of it.
    moved = Path(shards[1]).rename(tmp_path / "zz.tar")
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"{shards[1]}: cannot be read" in printed and f"{moved}: is not in the index" in printed
    # A damaged index is named first.
    segment = next((tmp_path / "index").glob("segment_*"))
    segment.write_bytes(segment.read_bytes()[:-1] + b"#")
    assert main(arguments) == 1
    assert f"{segment}: its column" in capsys.readouterr().out
