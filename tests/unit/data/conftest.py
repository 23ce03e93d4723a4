"""A small data set and a small configuration for the tests of the loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from bitdance_scale.config.data_schema import DataSection, Resolution
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import (
    CheckpointSection,
    HeadSection,
    LossSection,
    ModelSection,
    ObserveSection,
    OptimSection,
    RunConfig,
    RunSection,
    SampleSection,
    TextSection,
    VisionSection,
)
from bitdance_scale.data.index import build
from tests.unit.data.small_data import CharacterTokenizer, sample_members, write_tar


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards of 7, 5 and 9 images of 24 to 96 px; the short side of two thirds is at least 32 px."""
    folder = tmp_path_factory.mktemp("data_set")
    numbers = np.random.default_rng(5)
    paths, number = [], 0
    for shard, count in enumerate((7, 5, 9)):
        samples = {}
        for _ in range(count):
            short = 24 if number % 3 == 2 else int(numbers.integers(32, 65))
            height, width = (short, short + 32) if number % 2 else (short + 32, short)
            samples[f"{number:09d}"] = sample_members(height, width, "red circle " * (number % 7 + 1), number)
            number += 1
        paths.append(str(write_tar(folder / f"{shard:05d}.tar", samples)))
    return paths


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are scanned from here on."""
    paths: list[str] = []
    scan = build.scan_file
    monkeypatch.setattr(build, "scan_file", lambda task, **rest: paths.append(task.path) or scan(task, **rest))
    return paths


@pytest.fixture
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """Makes a run at 16 px (share 3) and 32 px (share 2) with cells of 4 x 4 px; arguments change its data section."""

    def make(shards: Sequence[str] = (), seed: int = 3, **data: object) -> RunConfig:
        settings: dict[str, object] = {
            "shards": tuple(shards),
            "global_batch": 10,
            "resolutions": (
                Resolution(side_px=16, share=3, buckets_px=((16, 16), (24, 8))),
                Resolution(side_px=32, share=2, buckets_px=((32, 32),)),
            ),
            "max_pack_tokens": 256,
            "pack_multiple": 16,
            "text_drop": 0.2,
        }
        return RunConfig(
            run=RunSection(name="test", seed=seed, steps=10),
            model=ModelSection(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=64),
            head=HeadSection(width=32),
            vision=VisionSection(weights="", num_bits=8, channel_mult=(1, 1, 1), block_side=2),
            text=TextSection(kind="sentencepiece", path=""),
            data=DataSection(**settings | data),
            parallel=ParallelSection(),
            optim=OptimSection(),
            loss=LossSection(),
            checkpoint=CheckpointSection(),
            sample=SampleSection(),
            observe=ObserveSection(),
        )

    return make
