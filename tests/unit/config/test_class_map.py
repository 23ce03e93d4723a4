"""Class maps: what they may be, and what a label means."""

from __future__ import annotations

import json

import pytest

from bitdance_scale.config.class_map import ClassLabels, ClassMap, read_class_map
from bitdance_scale.config.load import load_config
from bitdance_scale.config.named_files import check_named_files
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import ClassesSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.condition import ClassCondition

CLASS_CONDITIONAL = [
    "model.family=class_conditional",
    "classes.num_classes=3",
    "classes.grid=[8, 8]",
    "vision.channel_mult=[1, 1, 2]",
    "data.image_to_text_share=0.0",
    "data.resolutions=[{side_px=32, share=1, buckets_px=[[32, 32]]}]",
    "sample.size_px=[32, 32]",
]


@pytest.mark.parametrize(
    "content",
    [
        b"tench\nn02\nbig cat\n",
        b"\xef\xbb\xbftench\r\nn02\r\nbig cat",
        json.dumps({"big cat": 2, "tench": 0, "n02": 1}).encode(),
        b' \n{"n02": 1, "tench": 0, "big cat": 2}',
    ],
    ids=["lines", "windows", "object", "braces"],
)
def test_names_and_numbers_are_labels(tmp_path, content):
    path = tmp_path / "classes"
    path.write_bytes(content)
    assert read_class_map(path).names == ("tench", "n02", "big cat")
    labels = ClassLabels(ClassesSection(num_classes=3, map=str(path)))
    found = [labels.number(label) for label in ("tench", "n02", "big cat", "0", "2", "3", "02", "cat", "")]
    assert found == [0, 1, 2, 0, 2, None, None, None, None]
    section = ClassesSection(num_classes=3, num_tokens=2, map=str(path))
    condition = ClassCondition(section, 4, is_causal=False)
    assert condition.prompt_ids("n02").tolist() == condition.prompt_ids("1").tolist() == [2, 3]
    with pytest.raises(ConfigError, match=r"class 'cat': must be a name in classes.map = .* \(such as 'tench'\), or"):
        condition.prompt_ids("cat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no class"),
        (b"\n", "names no class"),
        (b"{}", "names no class"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "classes 0 and 2 have the same name 'a'"),
        (b"a\n b\n", "class 1 has the name ' b'"),
        (b"0\n1\n10\n2\n" + b"".join(b"%d\n" % n for n in range(3, 10)), "class 2 has the name '10', which is the num"),
        (b"caf\xe9\n", r"is not UTF-8 text \(byte 0xe9"),
        ("a\n".encode("utf-16"), "is UTF-16 text"),
        (b'{"a": 0', "is no valid JSON"),
        (b'{"a": 0, "a": 1}', "names 'a' twice"),
        (b'{"a": 0, "b": 0}', "'a' and 'b' have the same number 0"),
        (b'{"a": 1, "b": 2}', "'b' has the number 2: the numbers of 2 classes must be 0 to 1"),
        (b'{"a": 0, "b": true}', "'b' has the value True: must be the number"),
        (b'{"0": ["n01", "tench"]}', "'0' has the value .*must be the number of a class"),
    ],
)
def test_maps_that_are_none_are_refused_with_file_and_way_out(tmp_path, content, message):
    (tmp_path / "map").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_class_map(tmp_path / "map")
    assert str(caught.value).startswith(f"{tmp_path}/map: ")


def test_a_map_is_read_before_ranks_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "three").write_text("a\nb\nc\n")
    for name, prompts, message in (
        ("gone", "['a']", r"classes.map = 'gone': cannot be read \(No such file or directory\)"),
        ("two", "['a']", "classes.map = 'two': names 2 classes, classes.num_classes = 3; .*classes.num_classes=2"),
        ("three", "['a', 'x']", r"sample.prompts\[1\] = 'x': must be a name in classes.map = 'three'"),
    ):
        config = load_config("demo", [*CLASS_CONDITIONAL, f"classes.map={name}", f"sample.prompts={prompts}"])
        with pytest.raises(ConfigError, match=message):
            check_named_files(config)
    check_named_files(load_config("demo", [*CLASS_CONDITIONAL, "classes.map=three", "sample.prompts=['c', '0']"]))


def test_a_text_to_image_run_has_no_map():
    with pytest.raises(ConfigError, match="classes.map = 'x': model.family = 'text_to_image' has no classes"):
        check(load_config("demo", ["classes.map=x"]), 1)


def test_class_names_are_written_as_they_are_read(tmp_path):
    written = ClassMap(["b", "größe", "a"])
    (tmp_path / "map").write_text(written.text(), encoding="utf-8")
    assert read_class_map(tmp_path / "map").names == written.names
