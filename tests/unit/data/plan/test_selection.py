"""The stored selection: the same as a computed one, found again, shared, and never used when it is damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.config.data_schema import DataFilter, DataSection, DataSource
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan import selection
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.plan.selection import store_selection
from tests.unit.data.small_data import bare_index, sample_members, write_tar


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Two sources of 40 and 25 samples, with a score that half of them have."""
    monkeypatch.setattr(selection, "MIN_STORED_SAMPLES", 1)
    shards = []
    for name, count in (("a", 40), ("b", 25)):
        samples = {}
        for number in range(count):
            record = {"width": 16 + number, "height": 20, **({"score": number / 40} if number % 2 else {})}
            samples[f"{number}"] = sample_members(20, 16 + number, "red") | {"json": json.dumps(record).encode()}
        shards.append(str(write_tar(tmp_path / f"{name}.tar", samples)))
    return build_index(shards, tmp_path / "index").divided([1, 1])


@pytest.fixture
def data(make_config) -> DataSection:
    sources = (DataSource(name="a", shards=("a",), share=2), DataSource(name="b", shards=("b",), share=1))
    rules = (DataFilter(column="score", min=0.1, missing="keep"), DataFilter(column="aspect", max=2.5, source="a"))
    section = make_config(sources=sources, filters=rules).data
    return dataclasses.replace(
        section,
        resolutions=(section.resolutions[0], dataclasses.replace(section.resolutions[1], buckets_px=((20, 32),))),
    )


def files(index: Index) -> list[Path]:
    return sorted(index.table.parent.glob("selection_*.safetensors"))


def plans_agree(one: Plan, other: Plan) -> bool:
    batches = [(one.batch(step), other.batch(step)) for step in range(3)]
    same = all((getattr(a, f.name) == getattr(b, f.name)).all() for a, b in batches for f in dataclasses.fields(a)[1:])
    return same and one.filter_counts() == other.filter_counts() and one.num_eligible == other.num_eligible


def test_a_stored_selection_gives_the_same_plan(index: Index, data: DataSection, monkeypatch) -> None:
    computed = Plan(3, index, data)
    store_selection(index, data)
    assert len(files(index)) == 1
    monkeypatch.setattr(selection, "_compute", None)
    assert plans_agree(Plan(3, index, data), computed)
    store_selection(index, data)


def test_it_belongs_to_everything_that_decides_it(index: Index, data: DataSection) -> None:
    changes = [
        {},
        {"max_upscale": 1.5},
        {"filters": data.filters[:1]},
        {"resolutions": data.resolutions[:1]},
        {"sources": tuple(dataclasses.replace(source, has_borders=True) for source in data.sources)},
    ]
    for change in changes:
        store_selection(index, dataclasses.replace(data, **change))
    assert len(files(index)) == len(changes)
    # These do not change which samples can be drawn.
    for change in ({"global_batch": 20}, {"text_drop": 0.5}, {"max_pack_tokens": 512}):
        store_selection(index, dataclasses.replace(data, **change))
    assert len(files(index)) == len(changes)


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "no digests"])
def test_a_damaged_selection_is_made_again(index: Index, data: DataSection, caplog, damage: str) -> None:
    store_selection(index, data)
    (path,) = files(index)
    whole = path.read_bytes()
    if damage == "flipped bit":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(whole[:-100])
    else:
        path.with_suffix(".json").write_bytes(b"{")
    computed = Plan(3, bare_copy(index), data)
    store_selection(index, data)
    assert path.read_bytes() == whole
    assert plans_agree(Plan(3, index, data), computed)


def bare_copy(index: Index) -> Index:
    """The same index, which does not know its folder."""
    copy = index.divided([1, 1])
    copy.folder = None
    return copy


def test_a_folder_that_cannot_be_written_is_no_error(index: Index, data: DataSection, caplog, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(selection, "write_columns", refuse)
    store_selection(index, data)
    assert "Permission denied); every rank selects by itself" in caplog.text
    assert plans_agree(Plan(3, index, data), Plan(3, bare_copy(index), data))


def test_segments_and_chunks_do_not_matter(make_config, monkeypatch) -> None:
    """The same samples in one segment and chunk, and in several whose limits differ."""
    numbers = np.random.default_rng(0)
    height, width = numbers.integers(10, 60, (2, 1500))
    score = numbers.random(1500)
    data = make_config(shards=("x",), filters=(DataFilter(column="s", max=0.7),)).data
    whole = Plan(1, bare_index(height, width, s=score), data)
    monkeypatch.setattr(selection, "SAMPLES_PER_CHUNK", 256)
    parts = Plan(1, bare_index(height, width, segment_sizes=[1, 700, 0, 299, 500], s=score), data)
    assert plans_agree(parts, whole)
