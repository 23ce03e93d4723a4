"""The file of a bit shard: what is in it, and that it is read back."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from bitdance_scale.data.bit_shards import HAS_BITS, NOT_ENCODED, read_tables, shard_file, write_bit_shard
from bitdance_scale.data.data_errors import ErrorCause
from bitdance_scale.errors import DataError

META = {"format": 1, "recipe": {"classes": {"64": [[64, 64]]}}, "num_samples": 3}


def test_members_have_the_names_of_version_0_1(tmp_path: Path) -> None:
    path = tmp_path / shard_file(7)
    write_bit_shard(path, META, {64: [b"red", ErrorCause.BAD_IMAGE, None]})
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["meta.json", "64.bits", "64.start", "64.num_bytes", "64.crc", "64.fault"]
    meta, tables = read_tables(path)
    assert path.name == "000007.tar" and meta == META and list(tables) == [64]
    bad_image = 1 + list(ErrorCause).index(ErrorCause.BAD_IMAGE)
    assert tables[64].error_code.tolist() == [HAS_BITS, bad_image, NOT_ENCODED]
    start, num_bytes = int(tables[64].start[0]), int(tables[64].num_bytes[0])
    assert path.read_bytes()[start : start + num_bytes] == b"red"


def test_a_file_that_is_not_a_bit_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"half a shard")
    with pytest.raises(DataError, match="no usable bit shard.*Delete it and run `bitdance encode` again"):
        read_tables(tmp_path / "0.tar")
