"""Pictures and tables in Parquet."""

from __future__ import annotations

import sys

import pyarrow
import pyarrow.parquet
import pytest

from bitdance_scale.data.shard_writing.open_source import open_source
from bitdance_scale.data.shard_writing.pack import PackOptions, pack_source
from bitdance_scale.errors import DataError
from tests.unit.data.shard_writing.small_sources import records_of, samples_of, skipped_of, tree_digest, write
from tests.unit.data.small_data import encode_image


def pictures(count):
    return [encode_image(20 + number, 30, number) for number in range(count)]


def write_parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def hub_columns(count, start=0):
    """Columns as `datasets` writes them."""
    images = [{"bytes": content, "path": f"{start + n}.jpg"} for n, content in enumerate(pictures(count))]
    return {
        "image": images,
        "text": [f"caption {start + number}" for number in range(count)],
        "score": [number / 8 for number in range(count)],
    }


def test_structs_of_the_hub(tmp_path):
    write_parquet(tmp_path / "source" / "train-00000.parquet", hub_columns(5), row_group_size=2)
    write_parquet(tmp_path / "source" / "train-00001.parquet", hub_columns(4, 5), row_group_size=3)
    report = pack_source(tmp_path / "source", tmp_path / "out", PackOptions(samples_per_shard=4))
    assert report["shards"] == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 1}
    records = records_of(tmp_path / "out")
    assert list(records)[4:6] == ["train-00000.parquet#4", "train-00001.parquet#0"]
    assert [record["caption"] for record in records.values()] == [f"caption {number}" for number in range(9)]
    last = records["train-00001.parquet#3"]
    assert (last["score"], last["file_name"], last["height"]) == (0.375, "8.jpg", 23)
    contents = [members["jpg"] for members in samples_of(tmp_path / "out").values()]
    assert contents == [*pictures(5), *pictures(4)]


def test_a_binary_column_and_named_captions(tmp_path):
    columns = {"jpg": pictures(3), "thumbnail": [b"x"] * 3, "captions": [["first", "second"], [], None]}
    path = write_parquet(tmp_path / "data.parquet", columns)
    with pytest.raises(DataError, match="jpg and thumbnail all hold bytes; name one with --image"):
        open_source(path)
    report = pack_source(path, tmp_path / "out", PackOptions(image="jpg", caption="captions"))
    records = records_of(tmp_path / "out")
    assert records["data.parquet#0"]["caption"] == "first"
    assert records["data.parquet#0"]["captions"] == ["first", "second"]
    assert report["captions"] == {"missing_caption": 2}


def test_rows_without_bytes(tmp_path):
    images = [
        {"bytes": None, "path": "a.jpg"},
        None,
        {"bytes": pictures(1)[0], "path": None},
        {"bytes": b"", "path": ""},
    ]
    path = write_parquet(tmp_path / "data.parquet", {"image": images, "text": list("abcd")})
    assert pack_source(path, tmp_path / "out")["num_packed"] == 1
    assert skipped_of(tmp_path / "out") == {
        "data.parquet#0": "missing_file",
        "data.parquet#1": "missing_file",
        "data.parquet#3": "empty_file",
    }


@pytest.mark.parametrize("group_rows", [1, 7, 100])
def test_row_groups_and_workers_change_nothing(tmp_path, monkeypatch, group_rows):
    # As if a group of 100 rows were large: its shards are read in one walk.
    monkeypatch.setattr("bitdance_scale.data.shard_writing.parquet._LARGE_GROUP_BYTES", 10_000)
    # Sizes are means of a row group, so shards end by their number here.
    options = PackOptions(samples_per_shard=6, held_out=0.2)
    write_parquet(tmp_path / "a" / "data.parquet", hub_columns(40), row_group_size=group_rows)
    write_parquet(tmp_path / "b" / "data.parquet", hub_columns(40), row_group_size=13)
    pack_source(tmp_path / "a", tmp_path / "out_a", options, num_workers=3)
    pack_source(tmp_path / "b", tmp_path / "out_b", options)
    of_source = {"pack.json"}
    a, b = tree_digest(tmp_path / "out_a"), tree_digest(tmp_path / "out_b")
    assert {name: digest for name, digest in a.items() if name not in of_source} == {
        name: digest for name, digest in b.items() if name not in of_source
    }


def test_shards_that_are_missing_inside_a_large_group(tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_scale.data.shard_writing.parquet._LARGE_GROUP_BYTES", 10_000)
    write_parquet(tmp_path / "source" / "data.parquet", hub_columns(40), row_group_size=40)
    options = PackOptions(samples_per_shard=6)
    pack_source(tmp_path / "source", tmp_path / "whole", options)
    from bitdance_scale.data.shard_writing.output_folder import OutputFolder

    add_record = OutputFolder.add_record

    def stop_at(folder, number, record):
        if number == 3:
            raise KeyboardInterrupt
        add_record(folder, number, record)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "add_record", stop_at)
        with pytest.raises(KeyboardInterrupt):
            pack_source(tmp_path / "source", tmp_path / "out", options)
    (tmp_path / "out" / ".packing" / "00001.json").unlink()
    pack_source(tmp_path / "source", tmp_path / "out", options)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_a_table_in_parquet(tmp_path):
    source = tmp_path / "source"
    write(source / "1.jpg", pictures(1)[0])
    write_parquet(source / "metadata.parquet", {"file_name": ["1.jpg"], "text": ["x"], "score": [0.5]})
    pack_source(source, tmp_path / "out")
    assert records_of(tmp_path / "out")["1.jpg"]["score"] == 0.5


def test_refusals(tmp_path):
    addresses = write_parquet(tmp_path / "laion.parquet", {"URL": ["http://x"], "TEXT": ["x"]})
    with pytest.raises(DataError, match="list of addresses: download it with img2dataset"):
        open_source(addresses)
    with pytest.raises(DataError, match="is no readable Parquet"):
        open_source(write(tmp_path / "broken.parquet", b"PAR1"))
    path = write_parquet(tmp_path / "two" / "a.parquet", hub_columns(1))
    write_parquet(tmp_path / "two" / "b.parquet", {"other": pictures(1), "text": ["x"]})
    with pytest.raises(DataError, match="has no column 'image', which .*a.parquet has"):
        open_source(path.parent)
    with pytest.raises(DataError, match="column 'text' holds no pictures"):
        open_source(path, image="text")


def test_a_damaged_row_group_stops_the_run(tmp_path):
    path = write_parquet(tmp_path / "source" / "data.parquet", hub_columns(20), row_group_size=5, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:5000] = bytes(4800)
    path.write_bytes(content)
    with pytest.raises(DataError, match="row group 0 cannot be read"):
        pack_source(path.parent, tmp_path / "out")


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "data.parquet", hub_columns(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow, which is not installed: pip install 'bitdance_scale\[pack\]'"):
        open_source(path)
