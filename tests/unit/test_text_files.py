"""Text that a user hands in: a byte order mark is dropped, other encodings are named."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.errors import BitDanceError, CheckpointError, ConfigError
from bitdance_scale.generate.requests import read_requests
from bitdance_scale.text_files import decode_utf8, read_utf8
from bitdance_scale.weight_files import read_json

TEXT = "红色的圆, café"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_text(encoding):
    assert decode_utf8(TEXT.encode(encoding)) == TEXT
    assert decode_utf8("".encode(encoding)) == ""


def test_a_mark_within_the_text_stays():
    assert decode_utf8("a\ufeffb".encode()) == "a\ufeffb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "is UTF-16 text, expected UTF-8; save it as UTF-8"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16 text"),
        (TEXT.encode("utf-32"), "is UTF-32 text"),
        ("seed = 1".encode("utf-16-le"), "holds zero bytes, as UTF-16 without a byte order mark does"),
        ("café".encode("latin-1"), "is not UTF-8 text (byte 0xe9 after 3 bytes; it may be of ISO-8859-1"),
        ("红色".encode("gbk"), "is not UTF-8 text"),
    ],
)
def test_other_encodings_are_named(content, message):
    with pytest.raises(ValueError) as caught:
        decode_utf8(content)
    assert message in str(caught.value)


def test_line_ends_are_those_of_text(tmp_path):
    (tmp_path / "file").write_bytes(b"a\r\nb\rc\n")
    assert read_utf8(tmp_path / "file") == "a\nb\nc\n"


def prompts_of(path: Path) -> list[str]:
    return [request.prompt for request in read_requests(path, (64, 64), 0)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_all_that_a_user_hands_in_may_begin_with_a_mark(tmp_path, encoding):
    toml, json, text, lines = (tmp_path / name for name in ("a.toml", "b.json", "c.txt", "d.jsonl"))
    toml.write_text(f'extends = "demo"\n[sample]\nprompts = ["{TEXT}"]\n', encoding=encoding)
    json.write_text(f'{{"key": "{TEXT}"}}', encoding=encoding)
    text.write_text(f"{TEXT}\nb\n", encoding=encoding)
    lines.write_text(f'{{"prompt": "{TEXT}"}}\n', encoding=encoding)
    assert load_config(toml).sample.prompts == (TEXT,)
    assert read_json(json) == {"key": TEXT}
    assert prompts_of(text) == [TEXT, "b"] and prompts_of(lines) == [TEXT]


@pytest.mark.parametrize(
    ("read", "kind"), [(load_config, ConfigError), (read_json, CheckpointError), (prompts_of, ConfigError)]
)
def test_another_encoding_is_a_refusal_that_names_the_file(tmp_path, read, kind):
    path = tmp_path / "file"
    path.write_text('key = "café"', encoding="utf-16")
    with pytest.raises(BitDanceError, match=f"{path}: .*is UTF-16 text, expected UTF-8; save it as UTF-8") as caught:
        read(path)
    assert isinstance(caught.value, kind)
