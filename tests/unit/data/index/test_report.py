"""Skipped samples are counted and named, and too many of them stop training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.distributions import plot
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import check_skipped, skipped_samples, summary, suspicious_shards
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import sample_members, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Four shards of ten samples each."""
    members = sample_members(16, 16, "red")
    return [str(write_tar(tmp_path / f"{n}.tar", {f"{k}": members for k in range(10)})) for n in range(4)]


def index_of(shards: list[str], tmp_path: Path) -> Index:
    return build_index(shards, tmp_path / "index")


def test_sound_shards_pass(shards: list[str], tmp_path: Path) -> None:
    index = index_of(shards, tmp_path)
    check_skipped(index, 0.0)
    assert skipped_samples(index) == {} and list(suspicious_shards(index)) == []
    lines = summary(index)
    assert re.fullmatch(r"40 samples in 4 shards of [0-9.]{3,4} kB, index [0-9a-f]{32}", lines[0])
    assert lines[1] == "captions caption: usable 40, empty 0, missing 0, invalid 0"


def test_a_cut_shard_is_estimated_by_the_others(shards: list[str], tmp_path: Path) -> None:
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[: int(len(content) * 0.45)])
    index = index_of(shards, tmp_path)
    skipped = 10 - index.shards[1].num_samples
    assert 4 < skipped < 8 and skipped_samples(index) == {shards[1]: skipped}
    check_skipped(index, skipped / 40)
    message = rf"about {skipped} of 40 samples would be skipped: .*1.tar: {skipped} \(byte \d+: .* was cut\).*Fetch or"
    with pytest.raises(DataError, match=message):
        check_skipped(index, (skipped - 1) / 40)
    assert summary(index)[-1] == f"skipped: about {skipped} samples of 1 shards"
    assert [path for path, _ in suspicious_shards(index)] == [shards[1]]


def test_a_damaged_header_costs_its_sample_alone(shards: list[str], tmp_path: Path) -> None:
    with open(shards[2], "r+b") as file:
        file.seek(10)
        file.write(b"#")
    index = index_of(shards, tmp_path)
    assert index.errors() == {"damaged_tar": {shards[2]: 1}, "missing_image": {shards[2]: 1}}
    assert skipped_samples(index) == {shards[2]: 1}
    ((path, reason),) = suspicious_shards(index)
    assert path == shards[2] and "byte 0: the tar header fails its checksum" in reason


def test_scores_that_are_infinite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    """1e39 is more than a float32 holds; Python writes Infinity."""
    jpg, scores = sample_members(16, 16, None)["jpg"], ("0.5", "1.5", "2", "1e39", "Infinity", "-Infinity", "null")
    samples = {str(n): {"jpg": jpg, "json": b'{"score": %s}' % value.encode()} for n, value in enumerate(scores)}
    index = index_of([str(write_tar(tmp_path / "0.tar", samples))], tmp_path)
    assert "score score: 0.5 to 2, median 1.5, missing in 1, infinite in 3" in summary(index)
    plot(index, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_shards_that_look_wrong(tmp_path: Path) -> None:
    sound, silent = sample_members(16, 16, "red"), {"jpg": sample_members(16, 16, None)["jpg"]}
    counts = {"a": (sound, 10), "b": (sound, 10), "few": (sound, 3), "silent": (silent, 10)}
    shards = [
        str(write_tar(tmp_path / f"{name}.tar", {str(k): members for k in range(count)}))
        for name, (members, count) in counts.items()
    ]
    reasons = {Path(path).stem: reason for path, reason in suspicious_shards(index_of(shards, tmp_path))}
    assert reasons == {
        "few": "3 samples, the median has 10",
        "silent": "10 of 10 samples without a usable caption",
    }
