"""An epoch over changing numbers of replicas: every sample once, whatever the chain of resumes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.config.data_schema import DataSource, Resolution
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.loader_state import LoaderState
from tests.unit.data.small_data import encode_image, write_tar

CHAIN = (24, 16, 48, 100, 7)
STEPS_EACH = 2
NUM_SAMPLES = 1200
UNEVEN = (1, 700, 13, 400, 86)
"""Samples of each shard."""
RESOLUTIONS = (Resolution(side_px=16, share=1, buckets_px=((16, 16),)),)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    folder, image = tmp_path_factory.mktemp("uneven"), encode_image(16, 16)
    record = json.dumps({"width": 16, "height": 16}).encode()
    paths, number = [], 0
    for shard, count in enumerate(UNEVEN):
        samples = {}
        for _ in range(count):
            samples[f"{number:06d}"] = {"jpg": image, "txt": b"a" * (number % 40), "json": record}
            number += 1
        paths.append(str(write_tar(folder / f"{shard}.tar", samples)))
    assert number == NUM_SAMPLES
    return paths


@pytest.fixture(scope="module")
def index(shards: list[str], tmp_path_factory) -> Index:
    return build_index(shards, tmp_path_factory.mktemp("index"))


def run_steps(config, tokenizer, index: Index, num_ranks: int, state: LoaderState | None, num_steps: int):
    """Keys of each global batch over all replicas, and the state they all end with."""
    batches: list[Counter[int]] = [Counter() for _ in range(num_steps)]
    states = set()
    for rank in range(num_ranks):
        with Loader(config, tokenizer, index, rank, num_ranks, state) as loader:
            for batch in batches:
                step = loader.next_step()
                batch.update(key for pack in step.packs for key in pack.pack.sample_keys.tolist())
        states.add(json.dumps({**step.state.to_dict(), "num_data_ranks": 0}))
        state_out = step.state
    assert len(states) == 1 and len(states.pop()) < 1024
    return batches, state_out


@pytest.mark.large
def test_an_epoch_over_a_chain_of_replicas(shards, index, make_config, tokenizer) -> None:
    """24 -> 16 -> 48 -> 100 -> 7 replicas, other numbers of threads and steps ahead: nothing twice or missed."""
    state, seen = None, []
    for number, num_ranks in enumerate(CHAIN):
        config = make_config(
            shards,
            resolutions=RESOLUTIONS,
            global_batch=NUM_SAMPLES // (STEPS_EACH * len(CHAIN)),
            read_threads=1 + number % 3,
            prefetch_steps=1 + number % 2,
        )
        batches, state = run_steps(config, tokenizer, index, num_ranks, state, STEPS_EACH)
        seen += batches
    assert state.step == STEPS_EACH * len(CHAIN)
    assert sum(seen, Counter()) == Counter(range(NUM_SAMPLES))
    alone, _ = run_steps(config, tokenizer, index, 1, None, len(seen))
    assert alone == seen


def test_epochs_of_unequal_sources_go_by_source(shards, index, make_config, tokenizer) -> None:
    """Sources of 701 and 499 samples, one to one: after 499 of each only the small one begins again."""
    sources = tuple(DataSource(name=name, shards=(name,), share=1) for name in ("large", "small"))
    config = make_config((), sources=sources, resolutions=RESOLUTIONS, global_batch=120)
    divided = index.divided([2, 3])
    batches, _ = run_steps(config, tokenizer, divided, 3, None, 12)
    taken = sum(batches, Counter())
    counts = np.array([taken[key] for key in range(NUM_SAMPLES)])
    large, small = counts[:701], counts[701:]
    assert large.sum() == small.sum() == 720
    assert set(large.tolist()) == {1, 2} and (large == 2).sum() == 720 - 701
    assert set(small.tolist()) == {1, 2} and (small == 2).sum() == 720 - 499


@pytest.mark.parametrize("seed", [0, 1])
def test_any_chain_equals_one_run(shards, index, make_config, tokenizer, tmp_path: Path, seed: int) -> None:
    """Random numbers of replicas, a resume after every step."""
    draw = np.random.default_rng(seed)
    config = make_config(shards, resolutions=RESOLUTIONS, global_batch=50, image_to_text_share=0.3)
    expected, _ = run_steps(config, tokenizer, index, 1, None, 5)
    state, found = None, []
    for _ in range(5):
        batches, state = run_steps(config, tokenizer, index, int(draw.integers(1, 20)), state, 1)
        state = LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))
        found += batches
    assert found == expected
