"""Labels of class-conditional runs: where they are looked for, and which are refused."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.config.data_schema import CaptionChoice
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import ClassesSection, RunConfig
from bitdance_scale.data.captions import CaptionSource, CaptionStatus
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.labels import check_labels
from bitdance_scale.data.loader import Loader
from bitdance_scale.errors import DataError
from bitdance_scale.sequence.condition import load_condition
from tests.unit.data.small_data import encode_image, write_tar

NAMES = ("n01", "n02", "n03")


def config_of(source: str, num_classes: int = 3, class_map: str = "") -> RunConfig:
    config = load_config("demo")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, captions=(CaptionChoice(source=source),)),
        classes=ClassesSection(num_classes=num_classes, map=class_map),
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    """Samples 0..8 of class number % 3, whose label is in the key, in a member and in two fields."""
    jpg, samples = encode_image(16, 16), {}
    for number in range(9):
        label = number % 3
        record = {"width": 16, "height": 16, "label": label, "synset": NAMES[label], "list": [label]}
        members = {"jpg": jpg, "json": json.dumps(record).encode(), "cls": f"{label}\n".encode()}
        samples[f"train/{NAMES[label]}/{NAMES[label]}_{number}_x"] = members
    return str(write_tar(tmp_path_factory.mktemp("labels") / "0.tar", samples))


@pytest.fixture(scope="module")
def class_map(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("map") / "classes.txt"
    path.write_text("".join(f"{name}\n" for name in NAMES))
    return str(path)


@pytest.mark.parametrize("source", ["cls", "json:label", "json:list", "json:synset", "key_prefix", "key_folder"])
def test_every_source_gives_the_class(tmp_path, shard, class_map, source):
    index = build_index([shard], tmp_path / "index", captions=[source])
    has_names = source in ("json:synset", "key_prefix", "key_folder")
    expected = [[NAMES[number % 3] if has_names else str(number % 3)] for number in range(9)]
    assert index.texts(source, np.arange(9)) == expected
    assert not index.status(source).any() and not index.status(source, np.array([4, 2])).any()
    check_labels(index, config_of(source, class_map=class_map))
    if has_names:
        with pytest.raises(DataError, match=r"9 of 9 samples have no usable label in .*: 'n01'.*must be the number of"):
            check_labels(index, config_of(source))
    else:
        check_labels(index, config_of(source))


def test_parts_of_the_key_need_no_column_and_no_second_reading(tmp_path, shard):
    first = build_index([shard], tmp_path / "index", captions=["cls"])
    table = first.table.read_bytes()
    second = build_index([shard], tmp_path / "index", captions=["key_prefix", "cls", "key_folder"])
    assert second.table == first.table and first.table.read_bytes() == table
    assert second.captions == first.captions and second.hash == first.hash
    alone = build_index([shard], tmp_path / "alone", captions=["key_prefix"])
    assert alone.captions == ("caption",) and alone.texts("key_prefix", np.array([1])) == [["n02"]]


def test_labels_that_the_map_lacks_are_named(tmp_path, shard):
    (tmp_path / "map").write_text("n01\nn03\n")
    index = build_index([shard], tmp_path / "index", captions=["key_folder"])
    with pytest.raises(DataError) as caught:
        check_labels(index, config_of("key_folder", 2, str(tmp_path / "map")))
    message = str(caught.value)
    assert message.startswith(
        "data.captions: 3 of 9 samples have no usable label in 'key_folder': train/n02/n02_1_x of "
    )
    for text in (
        f"{shard}: 'n02'; train/n02/n02_4_x",
        "a name in classes.map = ",
        "(such as 'n01')",
        "classes.map, or",
    ):
        assert text in message, text


def test_wrong_labels_in_any_range_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_scale.data.labels._SAMPLES_AT_ONCE", 4)
    jpg = encode_image(16, 16)
    labels: list[object] = [0, 1, 2, 0, 1, 3, -1, True, 1.0, "1", [0, 1], None, "", "2"]
    samples = {
        f"{number:02d}": {"jpg": jpg, "json": json.dumps({"width": 16, "height": 16, "label": label}).encode()}
        for number, label in enumerate(labels)
    }
    index = build_index([str(write_tar(tmp_path / "0.tar", samples))], tmp_path / "index", captions=["json:label"])
    assert len(index) == len(labels)
    monkeypatch.setattr("bitdance_scale.data.labels.NUM_NAMED", 20)
    with pytest.raises(DataError) as caught:
        check_labels(index, config_of("json:label"))
    found = dict(
        part.split(" of ", 1) for part in str(caught.value).split("'json:label': ")[1].split(". The")[0].split("; ")
    )
    assert {number: text.split(": ")[1] for number, text in found.items()} == {
        "05": "'3'",
        "06": "'-1'",
        "07": "invalid",
        "08": "invalid",
        "10": "2 labels",
        "11": "missing",
        "12": "empty",
    }


def test_the_loader_trains_the_class_that_a_name_has(tmp_path):
    """Every picture is grey at 40 times the number of its class, which the order of names does not give."""
    names, samples = ("b", "c", "a"), {}
    for number in range(12):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (40 * (number % 3),) * 3).save(file, "PNG")
        samples[f"{names[number % 3]}/{number}"] = {"png": file.getvalue()}
    shard = str(write_tar(tmp_path / "0.tar", samples))
    (tmp_path / "map").write_text("b\nc\na\n")
    overrides = [
        "model.family=class_conditional",
        "data.image_to_text_share=0.0",
        "data.text_drop=0.0",
        "data.global_batch=12",
        "data.resolutions=[{side_px=32, share=1, buckets_px=[[32, 32]]}]",
        'data.captions=[{source="key_folder"}]',
        "classes.num_classes=3",
        "classes.num_tokens=2",
        "classes.grid=[8, 8]",
        "vision.channel_mult=[1, 1, 2]",
        f"classes.map={tmp_path}/map",
    ]
    config = load_config("demo", [*overrides, f"data.shards=['{shard}']"])
    index = build_index([shard], tmp_path / "index", captions=["key_folder"])
    check_labels(index, config)
    found = Counter()
    with Loader(config, load_condition(config), index, 0, 1) as loader:
        for loaded in loader.next_step().packs:
            documents = loaded.pack.document_ids
            for document, image in enumerate(loaded.images):
                first, second = loaded.pack.token_ids[documents == document][:2].tolist()
                assert second == first + 1
                found[first // 2, int(image[0, 0, 0])] += 1
    assert found == {(0, 0): 4, (1, 40): 4, (2, 80): 4}


@pytest.mark.parametrize(
    ("key", "prefix", "folder"),
    [
        (b"n01_1", b"n01", b""),
        (b"a/b_c/n01_2_n01", b"n01", b"b_c"),
        (b"n01/x", b"", b"n01"),
        (b"x", b"", b""),
        (b"/_x", b"", b""),
        (b"caf\xe9/caf\xe9_1", None, None),
    ],
)
def test_parts_of_keys(key, prefix, folder):
    for source, expected in (("key_prefix", prefix), ("key_folder", folder)):
        status = CaptionStatus.INVALID if expected is None else CaptionStatus[("USABLE" if expected else "MISSING")]
        assert CaptionSource.parse(source).find(key, {}, {}) == (expected or b"", status)
