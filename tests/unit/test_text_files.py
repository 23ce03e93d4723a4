"""Text that a user hands in: a byte order mark is dropped, other encodings are named."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.errors import BitDanceError, CheckpointError, ConfigError
from bitdance_scale.generate.requests import read_requests
from bitdance_scale.text_files import decode_utf8, is_utf8, read_utf8, split_lines
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


def test_only_line_feeds_end_lines():
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\nh\n"
    assert split_lines(text) == ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", "h"]
    assert split_lines("a\n\n") == ["a", ""] and split_lines("a") == ["a"]


def test_half_of_a_surrogate_pair_is_no_text():
    assert is_utf8(TEXT) and is_utf8("\U0001f600") and not is_utf8("a \ud83d") and not is_utf8("\udcff")


def prompts_of(path: Path) -> list[str]:
    return [request.prompt for request in read_requests(path, (64, 64), 0)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_all_that_a_user_hands_in_may_begin_with_a_mark(tmp_path, encoding):
    toml, record, text, lines = (tmp_path / name for name in ("a.toml", "b.json", "c.txt", "d.jsonl"))
    toml.write_text(f'extends = "demo"\n[sample]\nprompts = ["{TEXT}"]\n', encoding=encoding)
    record.write_text(f'{{"key": "{TEXT}"}}', encoding=encoding)
    text.write_text(f"{TEXT}\nb\n", encoding=encoding)
    lines.write_text(f'{{"prompt": "{TEXT}"}}\n', encoding=encoding)
    assert load_config(toml).sample.prompts == (TEXT,)
    assert read_json(record) == {"key": TEXT}
    assert prompts_of(text) == [TEXT, "b"] and prompts_of(lines) == [TEXT]


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
def test_a_prompt_may_hold_other_separators(tmp_path, name):
    prompts = [f"a{separator}b" for separator in "\u2028\u2029\x85\x7f"]
    if name == "a.txt":
        # JSON has these as escapes alone.
        prompts += [f"a{separator}b" for separator in "\x0b\x0c\x1c\x1d\x1e"]
    lines = prompts if name == "a.txt" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts]
    (tmp_path / name).write_bytes("\r\n".join(lines).encode())
    found = read_requests(tmp_path / name, (64, 64), 7)
    assert [request.prompt for request in found] == prompts
    assert [request.seed for request in found] == [*range(7, 7 + len(prompts))]


@pytest.mark.parametrize(
    ("read", "kind"), [(load_config, ConfigError), (read_json, CheckpointError), (prompts_of, ConfigError)]
)
def test_another_encoding_is_a_refusal_that_names_the_file(tmp_path, read, kind):
    path = tmp_path / "file"
    path.write_text('key = "café"', encoding="utf-16")
    with pytest.raises(BitDanceError, match=f"{path}: .*is UTF-16 text, expected UTF-8; save it as UTF-8") as caught:
        read(path)
    assert isinstance(caught.value, kind)
