"""Folders with metadata.jsonl or metadata.csv, as Hugging Face's imagefolder has them."""

from __future__ import annotations

import json
import math
import unicodedata

import pytest

from bitdance_scale.data.shard_writing.columns import numbers_of_texts
from bitdance_scale.data.shard_writing.pack import PackOptions, pack_source
from bitdance_scale.errors import DataError
from tests.unit.data.shard_writing.small_sources import records_of, skipped_of, write
from tests.unit.data.small_data import encode_image

PICTURE = encode_image(40, 50)


def pictures(folder, *names):
    for name in names:
        write(folder / name, PICTURE)
    return folder


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_jsonl(tmp_path):
    source = pictures(tmp_path / "source", "b.jpg", "sub dir/ü.JPG", "unnamed.jpg")
    write(source / "b.txt", "not this one")
    jsonl(
        source / "metadata.jsonl",
        {"file_name": "sub dir/ü.JPG", "text": "first", "score": 0.5, "is_photo": True, "width": 3, "box": {"x": 1}},
        {"file_name": "./b.jpg", "text": "second", "score": 7, "re_caption": ["one", "two"]},
        {"file_name": "gone.jpg", "text": "third"},
        {"file_name": "../outside.jpg", "text": "fourth"},
        {"file_name": "b.jpg", "text": None},
        {"text": "no name"},
    )
    report = pack_source(source, tmp_path / "out")
    records = records_of(tmp_path / "out")
    assert report["num_packed"] == 3 and report["captions"] == {"missing_caption": 1}
    assert report["left_out"] == {"pictures that no row names": 1}
    first = records["sub dir/ü.JPG"]
    assert (first["caption"], first["score"], first["is_photo"], first["width"]) == ("first", 0.5, True, 50)
    assert "box" not in first and "text" not in first and "file_name" not in first
    assert skipped_of(tmp_path / "out") == dict.fromkeys(("gone.jpg", "../outside.jpg", "(no name)"), "missing_file")


def test_rows_with_names_that_no_file_has(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    rows = [{"file_name": name, "text": "x"} for name in ("1.jpg", "\ud800.jpg", "1.jpg\0")]
    jsonl(source / "metadata.jsonl", *rows)
    report = pack_source(source, tmp_path / "out")
    assert report["num_packed"] == 1 and report["skipped"] == {"missing_file": 2}


def test_csv(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg", "2.jpg", "3.jpg")
    text = (
        "\ufefffile_name,caption,score,year,mixed,empty,long_id\r\n"
        '1.jpg,"a cat, ""sitting""\nquietly",0.5,1999,7,,12345678901234567890\r\n'
        "2.jpg,42,,2001,seven,,12345678901234567891\r\n"
        "3.jpg,nan,nan,-3,1,,12345678901234567892\r\n"
    )
    write(source / "metadata.csv", text)
    pack_source(source, tmp_path / "out")
    records = records_of(tmp_path / "out")
    assert [records[f"{n}.jpg"]["caption"] for n in (1, 2, 3)] == ['a cat, "sitting"\nquietly', "42", "nan"]
    assert [records[f"{n}.jpg"].get("score") for n in (1, 2, 3)] == [0.5, None, None]
    assert [records[f"{n}.jpg"]["year"] for n in (1, 2, 3)] == [1999, 2001, -3]
    assert [records[f"{n}.jpg"]["mixed"] for n in (1, 2, 3)] == ["7", "seven", "1"]
    assert [records[f"{n}.jpg"]["long_id"] for n in (1, 2, 3)] == [f"1234567890123456789{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", " -2 ", "", "+3", "4.", ".5", "6e-2", "1E3"], [1, -2, None, 3.0, 4.0, 0.5, 0.06, 1000.0]),
        # Identifiers, digits of other scripts, and what only Python takes for numbers.
        (["2023_01", "2023_02"], None),
        (["1_000.5"], None),
        (["\u0661\u0662"], None),
        (["\uff11\uff12"], None),
        (["1.\u0665"], None),
        (["\u00b2"], None),
        (["0x10"], None),
        (["1e"], None),
        (["123456789012345678", "1e20"], [123456789012345678, 1e20]),
        (["1", "1234567890123456789"], None),
        (["."], None),
        (["1", "infinite"], None),
        (["", " "], None),
    ],
)
def test_what_is_a_number_in_a_csv(cells, expected):
    assert numbers_of_texts(cells) == (cells if expected is None else expected)


def test_numbers_that_are_not_finite_are_no_texts():
    found = numbers_of_texts(["0.5", "NaN", "-inf", "Infinity", "1e400"])
    assert found[0] == 0.5 and math.isnan(found[1]) and found[2:] == [-math.inf, math.inf, math.inf]


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    (source / "metadata.csv").symlink_to("metadata.csv")
    with pytest.raises(DataError, match=r"metadata.csv: cannot be read \(Too many levels.*\); restore it"):
        pack_source(source, tmp_path / "out")


def test_a_caption_column_that_looks_like_numbers_stays_text(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    write(source / "metadata.csv", "file_name,title\n1.jpg,007\n")
    pack_source(source, tmp_path / "out", PackOptions(caption="title"))
    assert records_of(tmp_path / "out")["1.jpg"]["caption"] == "007"


def test_tables_of_nested_folders_name_what_is_below_them(tmp_path):
    source = pictures(tmp_path / "source", "train/1.jpg", "test/deep/1.jpg")
    jsonl(source / "train" / "metadata.jsonl", {"image_file_name": "1.jpg", "caption": "train"})
    write(source / "test" / "metadata.csv", "file_name,text\ndeep/1.jpg,test\n")
    pack_source(source, tmp_path / "out")
    captions = {name: record["caption"] for name, record in records_of(tmp_path / "out").items()}
    assert captions == {"train/1.jpg": "train", "test/deep/1.jpg": "test"}


def test_a_table_by_its_own_name(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    table = jsonl(source / "mine.jsonl", {"picture": "1.jpg", "title": "named", "other": "x"})
    pack_source(table, tmp_path / "out", PackOptions(caption="title", image="picture"))
    assert records_of(tmp_path / "out")["1.jpg"]["caption"] == "named"


def test_accents_that_are_written_apart(tmp_path):
    name = "café.jpg"
    source = pictures(tmp_path / "source", unicodedata.normalize("NFD", name))
    jsonl(source / "metadata.jsonl", {"file_name": unicodedata.normalize("NFC", name), "text": "x"})
    assert pack_source(source, tmp_path / "out")["num_packed"] == 1


def test_another_table_is_another_source(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    jsonl(source / "metadata.jsonl", {"file_name": "1.jpg", "text": "one"})
    pack_source(source, tmp_path / "out")
    jsonl(source / "metadata.jsonl", {"file_name": "1.jpg", "text": "two"})
    with pytest.raises(DataError, match="the names, sizes or tables of the source"):
        pack_source(source, tmp_path / "out")


def test_a_missing_caption_is_refused_before_anything_is_written(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg", "2.jpg")
    jsonl(source / "metadata.jsonl", {"file_name": "1.jpg", "text": "x"}, {"file_name": "2.jpg", "text": " "})
    with pytest.raises(DataError, match="no caption for 1 of 2 pictures, 2.jpg, and"):
        pack_source(source, tmp_path / "out", PackOptions(missing_caption="error"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "1.jpg"}', "no column text or caption; name it with --caption"),
        ("metadata.jsonl", '{"text": "x"}', "no column file_name or .*; name it with --image"),
        ("metadata.jsonl", '{"file_name": "1.jpg", "text": "a", "caption": "b"}', "text and caption could all be"),
        ("metadata.jsonl", '{"a_file_name": "1", "b_file_name": "2", "text": "b"}', "all name files"),
        ("metadata.jsonl", '{"file_name": "1.jpg"\n', "line 1 is no JSON"),
        ("metadata.jsonl", "[1]\n", "line 1 holds no JSON object"),
        ("metadata.jsonl", "\n", "is empty"),
        ("metadata.csv", "", "is empty"),
        ("metadata.csv", "file_name,text\n1.jpg,a,b\n", "row 2 has 3 cells, the first line names 2 columns"),
        ("metadata.csv", "file_name,text,text\n1.jpg,a,b\n", "two columns have the same name"),
        ("metadata.csv", "file_name,text\n", "holds no pictures"),
        ("metadata.csv", b"file_name,text\n1.jpg,caf\xe9\n", "is not UTF-8 \\(byte 0xe9\\)"),
        ("metadata.csv", 'file_name,text\n1.jpg,"a\n', "is no valid CSV"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, content, message):
    source = pictures(tmp_path / "source", "1.jpg")
    write(source / name, content)
    with pytest.raises(DataError, match=message) as caught:
        pack_source(source, tmp_path / "out")
    assert str(source) in str(caught.value)


def test_two_tables_in_one_folder_are_refused(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    write(source / "metadata.csv", "file_name,text\n1.jpg,x\n")
    jsonl(source / "metadata.jsonl", {"file_name": "1.jpg", "text": "x"})
    with pytest.raises(DataError, match="lie in one folder"):
        pack_source(source, tmp_path / "out")


def test_a_column_that_is_not_there(tmp_path):
    source = pictures(tmp_path / "source", "1.jpg")
    with pytest.raises(DataError, match="--caption names a column, but there is no metadata"):
        pack_source(source, tmp_path / "out", PackOptions(caption="x"))
    jsonl(source / "metadata.jsonl", {"file_name": "1.jpg", "text": "x"})
    with pytest.raises(DataError, match="there is no column 'y'; the columns are file_name, text"):
        pack_source(source, tmp_path / "out", PackOptions(caption="y"))
