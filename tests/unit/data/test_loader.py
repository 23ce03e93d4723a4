"""The loader end to end: the same batches for any number of ranks, exact resume, skipped samples, ended threads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.config.data_schema import DataSource
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data import loader as loader_module
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import LoadedPack, Loader
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.errors import CheckpointError, ConfigError, DataError
from bitdance_scale.parallel.agreement import from_all_ranks
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.train.shared_index import training_index
from tests.unit.data.small_data import encode_image, sample_members, write_tar


@pytest.fixture
def index(data_set: list[str], tmp_path: Path) -> Index:
    return build_index(data_set, tmp_path / "index")


def contents(loaded: LoadedPack) -> list[tuple[object, ...]]:
    """Every sample of a pack: key, tokens of its positions, image."""
    pack = loaded.pack
    samples = []
    for document, (key, image) in enumerate(zip(pack.sample_keys.tolist(), loaded.images, strict=True)):
        tokens = pack.token_ids[pack.document_ids == document]
        samples.append((key, tokens.tobytes(), image.shape, image.tobytes()))
    return samples


def assert_equal_packs(first: LoadedPack, second: LoadedPack) -> None:
    for field in dataclasses.fields(Pack):
        ours, theirs = getattr(first.pack, field.name), getattr(second.pack, field.name)
        assert type(ours) is type(theirs)
        np.testing.assert_array_equal(ours, theirs)
    assert len(first.images) == len(second.images)
    for ours, theirs in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert first.state == second.state
    assert (first.step, first.num_packs_in_step, first.is_last_in_step) == (
        second.step,
        second.num_packs_in_step,
        second.is_last_in_step,
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_global_batches_do_not_depend_on_the_number_of_ranks(index, make_config, tokenizer, num_ranks: int) -> None:
    config = make_config(image_to_text_share=0.2)
    batches = []
    for size in (1, num_ranks):
        loaders = [Loader(config, tokenizer, index, rank, size) for rank in range(size)]
        steps = [[loader.next_step() for loader in loaders] for _ in range(4)]
        for loader in loaders:
            loader.close()
        for step in steps:
            assert len({len(one.packs) for one in step}) == 1
            assert all(pack.pack.num_positions <= 256 for one in step for pack in one.packs)
            assert all(one.images_by_resolution == {16: 6, 32: 4} for one in step)
        batches.append([sorted(s for one in step for pack in one.packs for s in contents(pack)) for step in steps])
    assert [len(batch) for batch in batches[0]] == [10] * 4
    assert batches[0] == batches[1]


def test_state_resumes_after_every_pack(index, make_config, tokenizer) -> None:
    config = make_config(max_pack_tokens=176)
    with Loader(config, tokenizer, index, 1, 2) as loader:
        packs = [next(loader) for _ in range(9)]
    assert packs[0].num_packs_in_step >= 3, "the test wants resumes inside a step"
    for number, loaded in enumerate(packs[:-2]):
        text = json.dumps(loaded.state.to_dict())
        assert len(text) < 1024
        with Loader(config, tokenizer, index, 1, 2, LoaderState.from_dict(json.loads(text))) as resumed:
            assert_equal_packs(next(resumed), packs[number + 1])
            assert_equal_packs(next(resumed), packs[number + 2])


def test_other_number_of_ranks_resumes_at_a_step_boundary_only(index, make_config, tokenizer) -> None:
    config = make_config()
    with Loader(config, tokenizer, index, 0, 2) as loader:
        inside, boundary = next(loader).state, loader.next_step().state
        expected = loader.next_step()
        with Loader(config, tokenizer, index, 1, 2, boundary) as second:
            expected_samples = sorted(s for p in (*expected.packs, *second.next_step().packs) for s in contents(p))
    with Loader(config, tokenizer, index, 0, 1, boundary) as alone:
        step = alone.next_step()
    assert (step.step, boundary.pack) == (1, 0)
    assert sorted(s for pack in step.packs for s in contents(pack)) == expected_samples
    with pytest.raises(CheckpointError, match="inside step 0, after pack 1 on each of 2 .* replicas; this run has 3"):
        Loader(config, tokenizer, index, 0, 3, inside)


def test_threads_and_prefetch_change_nothing(index, make_config, tokenizer) -> None:
    runs = []
    for read_threads, prefetch_steps in ((1, 1), (4, 3)):
        config = make_config(read_threads=read_threads, prefetch_steps=prefetch_steps)
        with Loader(config, tokenizer, index, 0, 2) as loader:
            runs.append([next(loader) for _ in range(12)])
    for first, second in zip(*runs, strict=True):
        assert_equal_packs(first, second)


def test_images_fit_the_pack(index, make_config, tokenizer) -> None:
    with Loader(make_config(), tokenizer, index, 0, 1) as loader:
        step = loader.next_step()
    assert step.num_skipped == 0 and step.wait_s >= 0
    for loaded in step.packs:
        assert loaded.pack.vision_bits is None
        assert loaded.pack.num_positions % 16 == 0
        for grid, image in zip(loaded.pack.sample_grids.tolist(), loaded.images, strict=True):
            assert image.dtype == np.uint8 and image.shape == (4 * grid[0], 4 * grid[1], 3)


def test_states_of_another_run_are_refused(index, data_set, make_config, tokenizer, tmp_path: Path) -> None:
    config = make_config()
    with Loader(config, tokenizer, index, 0, 1) as loader:
        state = next(loader).state
    other_index = build_index(data_set[:2], tmp_path / "other")
    cases = [
        (config, other_index, "index .*data.shards now gives"),
        (make_config(seed=9), index, "run.seed=3, now it is 9"),
        (make_config(global_batch=20), index, "another data.global_batch"),
    ]
    for changed, used, message in cases:
        with pytest.raises(CheckpointError, match=message):
            Loader(changed, tokenizer, used, 0, 1, state)
    inside = dataclasses.replace(state, pack=50)
    with (
        Loader(config, tokenizer, index, 0, 1, inside) as loader,
        pytest.raises(CheckpointError, match="after pack 50"),
    ):
        next(loader)
    with pytest.raises(CheckpointError, match="expected the fields"):
        LoaderState.from_dict({"step": 3})


@pytest.fixture
def mixed(data_set, make_config, tmp_path: Path) -> tuple[RunConfig, Index]:
    """A run on two folders of shards, 2 : 1, and its index."""
    folders = {"open": data_set[:2], "own": data_set[2:]}
    for name, shards in folders.items():
        (tmp_path / name).mkdir()
        for shard in shards:
            shutil.copy2(shard, tmp_path / name)
    sources = tuple(
        DataSource(name=name, shards=(str(tmp_path / name),), share=share) for name, share in (("open", 2), ("own", 1))
    )
    config = make_config(sources=sources, max_pack_tokens=176, image_to_text_share=0.2)
    return config, training_index(config.data)


def test_sources_are_read_in_their_shares_by_any_number_of_ranks(mixed, tokenizer) -> None:
    config, index = mixed
    runs = []
    for size in (1, 2, 3):
        loaders = [Loader(config, tokenizer, index, rank, size) for rank in range(size)]
        steps = [[loader.next_step() for loader in loaders] for _ in range(6)]
        for loader in loaders:
            loader.close()
        runs.append([sorted(s for one in step for pack in one.packs for s in contents(pack)) for step in steps])
        own = [sum(key in index.sources[1] for key, *_ in samples) for samples in runs[-1]]
        # Of 6 and 4 images a step, a third: exact in the small class, and in both after every third step.
        assert sum(own[:3]) == sum(own[3:]) == 10
        for number, step in enumerate(steps):
            expected = {"open": 10 * (number + 1) - sum(own[: number + 1]), "own": sum(own[: number + 1])}
            assert all(one.images_by_source == expected for one in step)
    assert runs[0] == runs[1] == runs[2]


def test_state_of_sources_resumes_after_every_pack_and_is_as_small(mixed, tokenizer) -> None:
    config, index = mixed
    with Loader(config, tokenizer, index, 1, 2) as loader:
        packs = [next(loader) for _ in range(9)]
        boundary = next(pack for pack in packs if pack.is_last_in_step)
        expected = loader.next_step().images_by_source
    for number, loaded in enumerate(packs[:-1]):
        text = json.dumps(loaded.state.to_dict())
        assert len(text) < 1024
        with Loader(config, tokenizer, index, 1, 2, LoaderState.from_dict(json.loads(text))) as resumed:
            assert_equal_packs(next(resumed), packs[number + 1])
    # Counts of the run are right after a resume on other ranks: they are of the plan.
    with Loader(config, tokenizer, index, 0, 1, boundary.state) as resumed:
        while (step := resumed.next_step()).step < loader.state.step - 1:
            pass
    assert step.images_by_source == expected


def test_states_of_other_sources_are_refused(mixed, tokenizer) -> None:
    config, index = mixed
    with Loader(config, tokenizer, index, 0, 1) as loader:
        state = loader.next_step().state
    first, second = config.data.sources
    for sources in (
        (dataclasses.replace(first, share=3), second),
        (first, dataclasses.replace(second, name="bought")),
    ):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
        with pytest.raises(CheckpointError, match="or data.sources .names, shares, shards of each."):
            Loader(changed, tokenizer, index, 0, 1, state)
    with pytest.raises(CheckpointError, match="shards of each"):
        Loader(config, tokenizer, index.divided([1, 2]), 0, 1, state)
    alone = dataclasses.replace(first, share=1), dataclasses.replace(second, share=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=alone))
    with pytest.raises(CheckpointError, match="index .*now gives .*or data.sources"):
        Loader(config, tokenizer, training_index(config.data), 0, 1, state)


def broken_data_set(tmp_path: Path, num_good: int, num_broken: int) -> list[str]:
    """One shard; the images of the broken samples are cut, behind a whole header."""
    samples = {}
    for number in range(num_good + num_broken):
        members = sample_members(40, 40, f"picture {number}", number)
        if number >= num_good:
            members["jpg"] = members["jpg"][:-300]
        samples[f"{number:03d}"] = members
    return [str(write_tar(tmp_path / "00000.tar", samples))]


def test_unreadable_images_are_holes_and_the_plan_stands(make_config, tokenizer, tmp_path: Path) -> None:
    shards = broken_data_set(tmp_path, num_good=6, num_broken=2)
    index = build_index(shards, tmp_path / "index")
    with Loader(make_config(global_batch=20), tokenizer, index, 0, 1) as loader:
        steps = [loader.next_step() for _ in range(4)]
        ledger, plan = loader.error_counter, loader.plan
    for step in steps:
        planned = plan.batch(step.step).samples
        kept = sorted(key for pack in step.packs for key in pack.pack.sample_keys.tolist())
        assert kept == sorted(planned[planned < 6].tolist())
        assert step.num_skipped == (planned >= 6).sum() == sum(pack.num_skipped for pack in step.packs)
    assert ledger.num_read == 80
    assert ledger.counts() == {"bad_image": {shards[0]: ledger.num_skipped}}
    # Each class goes through its 8 samples five times or more; 2 of 8 are broken.
    assert ledger.num_skipped == sum(step.num_skipped for step in steps) == 20


def test_a_pack_of_holes_still_runs_and_adds_to_no_loss(make_config, tokenizer, tmp_path: Path) -> None:
    index = build_index(broken_data_set(tmp_path, num_good=0, num_broken=3), tmp_path / "index")
    with Loader(make_config(), tokenizer, index, 0, 1) as loader:
        loaded = next(loader)
    assert len(loaded.images) == len(loaded.pack.sample_keys) == 1 and loaded.num_skipped > 1
    assert loaded.images[0].shape[:2] == tuple(4 * loaded.pack.sample_grids[0])
    assert len(loaded.pack.predict_positions) == len(loaded.pack.text_positions) == 0
    assert not loaded.pack.sample_predicts.any()


def test_too_many_holes_stop_the_run(make_config, tokenizer, tmp_path: Path) -> None:
    shards = broken_data_set(tmp_path, num_good=6, num_broken=2)
    index = build_index(shards, tmp_path / "index")
    config = make_config(global_batch=200, max_pack_tokens=4096, max_skipped_share=0.01)
    with (
        Loader(config, tokenizer, index, 0, 1) as loader,
        pytest.raises(DataError, match="bad_image .*00000.tar") as stopped,
    ):
        for _ in range(6):
            loader.next_step()
            loader.error_counter.check(loader.error_counter.totals, from_all_ranks)
    assert "more than data.max_skipped_share=0.01 allows" in str(stopped.value)
    assert loader.error_counter.num_read == 1000


def test_shards_changed_or_lost_become_holes(data_set, make_config, tokenizer, tmp_path: Path) -> None:
    shards = [shutil.copy2(path, tmp_path) for path in data_set]
    index = build_index(shards, tmp_path / "copied")
    Path(shards[0]).unlink()
    write_tar(Path(shards[1]), {"0": {"jpg": encode_image(40, 40)}})
    with Loader(make_config(global_batch=40), tokenizer, index, 0, 1) as loader:
        loader.next_step()
    counts = loader.error_counter.counts()
    assert set(counts["read_failed"]) >= {shards[0]}
    assert shards[2] not in {shard for by_shard in counts.values() for shard in by_shard}
    assert loader.error_counter.num_skipped == sum(sum(by_shard.values()) for by_shard in counts.values()) > 0


def test_samples_without_caption_train_unconditionally_and_are_counted(make_config, tokenizer, tmp_path: Path) -> None:
    members = {
        "0": sample_members(40, 40, "a star"),
        "1": sample_members(40, 40, "  "),
        "2": sample_members(40, 40, None),
    }
    shard = str(write_tar(tmp_path / "0.tar", members))
    index = build_index([shard], tmp_path / "index")
    config = make_config(global_batch=30, text_drop=0.0, image_to_text_share=0.0)
    with Loader(config, tokenizer, index, 0, 1) as loader:
        step = loader.next_step()
    # 18 of class 16 and 12 of class 32, each through its 3 samples 6 and 4 times.
    assert loader.error_counter.counts() == {"empty_caption": {shard: 10}, "missing_caption": {shard: 10}}
    assert step.num_skipped == 0
    for loaded in step.packs:
        for document, key in enumerate(loaded.pack.sample_keys.tolist()):
            ids = loaded.pack.token_ids[loaded.pack.document_ids == document]
            prompt = tokenizer.prompt_ids("a star") if key == 0 else tokenizer.unconditional_ids()
            np.testing.assert_array_equal(ids[: len(prompt)], prompt)


def test_errors_of_the_threads_reach_the_consumer(index, make_config, tokenizer, monkeypatch) -> None:
    with (
        Loader(make_config(max_pack_tokens=64), tokenizer, index, 0, 1) as loader,
        pytest.raises(ConfigError, match=r"data.max_pack_tokens=64: a sample of the batch has"),
    ):
        next(loader)

    def fail(*_: object) -> None:
        raise RuntimeError("decoder ran out of luck")

    monkeypatch.setattr(loader_module, "decode_image", fail)
    with Loader(make_config(), tokenizer, index, 0, 1) as loader, pytest.raises(RuntimeError, match="out of luck"):
        next(loader)


def test_close_ends_all_threads(index, make_config, tokenizer) -> None:
    for num_taken in (0, 2):
        with Loader(make_config(), tokenizer, index, 0, 1) as loader:
            for _ in range(num_taken):
                next(loader)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("data-")]
        with pytest.raises(ValueError, match="closed"):
            next(loader)


def test_a_stalled_read_is_named(index, make_config, tokenizer, monkeypatch, caplog) -> None:
    """Shard, sample and byte of what is waited for, while it is waited for."""
    is_released = threading.Event()
    read = ShardReader.image

    def stall(reader: ShardReader, index: Index, sample: int) -> bytes:
        assert is_released.wait(30)
        return read(reader, index, sample)

    monkeypatch.setattr(ShardReader, "image", stall)
    monkeypatch.setattr(loader_module, "STALL_S", 0.05)
    with Loader(make_config(), tokenizer, index, 0, 1) as loader:
        threading.Timer(0.5, is_released.set).start()
        step = loader.next_step()
    first = step.packs[0].pack.sample_keys[0]
    num_bytes = index.place(first).num_bytes
    expected = f"waiting for {index.shard_path(first)}: sample {index.name(first)}, {num_bytes} bytes from byte"
    assert expected in caplog.text
    assert step.num_skipped == 0


def test_steps_read_ahead_are_counted(index, make_config, tokenizer) -> None:
    with Loader(make_config(prefetch_steps=3), tokenizer, index, 0, 1) as loader:
        loader.next_step()
        deadline_s = time.monotonic() + 30
        while loader._num_ready() < 3:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert loader.next_step().num_ready >= 2


def test_errors_of_a_step_are_counted_by_cause(make_config, tokenizer, tmp_path: Path) -> None:
    members = {"0": sample_members(40, 40, "a"), "1": sample_members(40, 40, None), "2": {"jpg": b"\xff\xd8"}}
    members["2"] |= {"json": members["0"]["json"], "txt": b" "}
    index = build_index([str(write_tar(tmp_path / "0.tar", members))], tmp_path / "index")
    with Loader(make_config(global_batch=15), tokenizer, index, 0, 1) as loader:
        step = loader.next_step()
    counts = {str(cause): count for cause, count in step.sample_errors.items()}
    assert counts == {"missing_caption": 5, "empty_caption": 5, "bad_image": 5} and step.num_skipped == 5
