"""Several sources in one plan: shares exact at every prefix, epochs per source, one source like `data.shards`."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdance_scale.config.data_schema import DataSection, DataSource, Resolution
from bitdance_scale.config.schema import EvaluateSection
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index, ShardEntry
from bitdance_scale.data.plan.apportion import Apportionment
from bitdance_scale.data.plan.plan import Plan, PlannedBatch
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.train.evaluation import held_out_run
from bitdance_scale.train.shared_index import labelled_index, run_index, training_index
from tests.unit.data.small_data import bare_index

SIDES_PX = (16, 32, 64)


def make_index(*sides_px: Sequence[int]) -> Index:
    """One shard per source, of square images of these sides."""
    sides = np.array([side for source in sides_px for side in source], dtype=np.int32)
    shards = tuple(ShardEntry(f"/{number}.tar", 0, "", len(source), {}) for number, source in enumerate(sides_px))
    return bare_index(sides, sides, shards).divided([1] * len(sides_px))


def make_data(
    source_shares: Sequence[int], resolution_shares: Sequence[int] = (1,), global_batch: int = 10
) -> DataSection:
    return DataSection(
        sources=tuple(
            DataSource(name=f"s{number}", shards=(f"/{number}.tar",), share=share)
            for number, share in enumerate(source_shares)
        ),
        global_batch=global_batch,
        resolutions=tuple(
            Resolution(side_px=side, share=share, buckets_px=((side, side),))
            for side, share in zip(SIDES_PX, resolution_shares, strict=False)
        ),
        max_pack_tokens=1024,
    )


def drawn(plan: Plan, num_steps: int) -> dict[str, np.ndarray]:
    """Columns of the first batches, one after the other."""
    batches = [plan.batch(step) for step in range(num_steps)]
    names = [field.name for field in dataclasses.fields(PlannedBatch) if field.name != "step"]
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names}


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Index, DataSection]:
    """Two to four sources of 1 to 13 images; all have one for the smallest resolution, the first has one for each."""
    num_sources = draw(st.integers(2, 4))
    sides = st.lists(st.sampled_from([16, 20, 40, 70]), min_size=1, max_size=12)
    source_sides = draw(st.lists(sides, min_size=num_sources, max_size=num_sources))
    # Every resolution has a sample somewhere.
    source_sides[0].append(70)
    resolution_shares = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    source_shares = draw(st.lists(st.integers(1, 30), min_size=num_sources, max_size=num_sources))
    return make_index(*source_sides), make_data(source_shares, resolution_shares, draw(st.integers(1, 30)))


@settings(deadline=None, max_examples=25)
@given(mixture=mixtures())
def test_resolutions_and_sources_are_less_than_one_off_at_every_prefix(mixture: tuple[Index, DataSection]) -> None:
    index, data = mixture
    plan = Plan(1, index, data)
    columns = drawn(plan, num_steps=12)
    resolution_shares = [resolution.share for resolution in data.resolutions]
    sides = [resolution.side_px for resolution in data.resolutions]
    # The resolutions are as they are without sources.
    labels = Apportionment(resolution_shares).labels(0, len(columns["side_px"]))
    np.testing.assert_array_equal(columns["side_px"], np.array(sides)[labels])
    is_complete = True
    for side in sides:
        shares = np.array(
            [
                source.share if (index.sizes_px(slice(samples.start, samples.stop))[:, 0] >= side).any() else 0
                for source, samples in zip(data.sources, index.sources, strict=True)
            ]
        )
        is_complete &= bool(shares.all())
        stream = columns["source"][columns["side_px"] == side]
        counts = np.cumsum(stream[:, None] == np.arange(len(shares)), axis=0)
        deviation = counts * shares.sum() - np.arange(1, len(stream) + 1)[:, None] * shares
        assert (np.abs(deviation) < shares.sum()).all()
        # Exact after every multiple of the shares in lowest terms.
        period = int(shares.sum() // np.gcd.reduce(shares))
        assert not deviation[period - 1 :: period].any()
    if is_complete:
        shares = np.array([source.share for source in data.sources])
        counts = np.cumsum(columns["source"][:, None] == np.arange(len(shares)), axis=0)
        excess = counts * shares.sum() - np.arange(1, len(counts) + 1)[:, None] * shares
        assert (np.abs(excess) < len(sides) * shares.sum()).all()


@settings(deadline=None, max_examples=25)
@given(mixture=mixtures())
def test_every_stream_goes_through_its_own_samples_epoch_by_epoch(mixture: tuple[Index, DataSection]) -> None:
    index, data = mixture
    plan = Plan(1, index, data)
    columns = drawn(plan, num_steps=15)
    uses = {(use.source, use.side_px): use for use in plan.uses(15)}
    totals = Counter()
    for number, (source, samples) in enumerate(zip(data.sources, index.sources, strict=True)):
        for side in (resolution.side_px for resolution in data.resolutions):
            is_stream = (columns["source"] == number) & (columns["side_px"] == side)
            stream, epochs = columns["samples"][is_stream], columns["epoch"][is_stream]
            eligible = [sample for sample in samples if index.size_px(sample)[0] >= side]
            size = len(eligible)
            assert set(stream.tolist()) <= set(eligible)
            assert epochs.tolist() == [place // max(1, size) for place in range(len(stream))]
            for epoch in range(len(stream) // max(1, size)):
                assert sorted(stream[epochs == epoch].tolist()) == eligible
            # Including the epoch that is under way.
            assert len(set(zip(epochs.tolist(), stream.tolist(), strict=True))) == len(stream)
            use = uses[source.name, side]
            assert (use.num_samples, use.num_images) == (size, len(stream))
            assert use.epochs == (len(stream) / size if size else 0)
            totals[source.name] += len(stream)
    assert plan.images_by_source(15) == totals and plan.images_by_source(0) == dict.fromkeys(totals, 0)


@settings(deadline=None, max_examples=30)
@given(mixture=mixtures(), step=st.integers(0, 10**9))
def test_any_step_is_planned_without_those_before_it(mixture: tuple[Index, DataSection], step: int) -> None:
    index, data = mixture
    plan = Plan(1, index, data)
    expected = plan.batch(step)
    plan.batch(0)
    again = Plan(1, index, data)
    for name, values in vars(again.batch(step)).items():
        np.testing.assert_array_equal(values, getattr(expected, name))
    drawn_there = {
        name: again.images_by_source(step + 1)[name] - count for name, count in again.images_by_source(step).items()
    }
    assert drawn_there == {f"s{number}": (expected.source == number).sum() for number in range(len(data.sources))}


def test_a_batch_of_whole_shares_is_exact_in_every_resolution() -> None:
    """The SFT stage: 2,320 images at two resolutions of equal share; 3 : 1 of 1,160 is 870 and 290."""
    data = make_data((3, 1), (1, 1), global_batch=2320)
    plan = Plan(0, make_index([40] * 500, [40] * 90), data)
    for step in (0, 1, 40_000):
        batch = plan.batch(step)
        found = Counter(zip(batch.side_px.tolist(), batch.source.tolist(), strict=True))
        assert found == {(16, 0): 870, (16, 1): 290, (32, 0): 870, (32, 1): 290}
    assert plan.images_by_source(40_000) == {"s0": 1740 * 40_000, "s1": 580 * 40_000}


def test_a_source_without_samples_for_a_resolution_leaves_its_share_there_to_the_others() -> None:
    data = make_data((5, 3, 2), (1, 1), global_batch=200)
    plan = Plan(0, make_index([20] * 7, [40] * 7, [40] * 7), data)
    batch = plan.batch(3)
    by_resolution = {side: Counter(batch.source[batch.side_px == side].tolist()) for side in (16, 32)}
    assert by_resolution == {16: {0: 50, 1: 30, 2: 20}, 32: {1: 60, 2: 40}}
    assert [(use.source, use.num_samples) for use in plan.uses(1) if use.side_px == 32] == [
        ("s0", 0),
        ("s1", 7),
        ("s2", 7),
    ]


def test_a_source_or_a_resolution_without_any_sample_is_refused() -> None:
    for others in ([10, 12], []):
        with pytest.raises(DataError, match=f"none of the {len(others)} images of source 's1' fills a bucket of any"):
            Plan(0, make_index([40], others), make_data((1, 1)))
    with pytest.raises(DataError, match="none of the 3 images fills a bucket of resolution 32 px"):
        Plan(0, make_index([20], [20, 30]), make_data((1, 1), (1, 1)))


def test_one_source_has_one_plan_however_it_is_named() -> None:
    """Whether `data.shards` or `data.sources` names the source makes no difference; the digests are pinned."""
    numbers = np.random.default_rng(0)
    sizes = numbers.integers(10, 70, (2, 300)).astype(np.int32)
    index = bare_index(*sizes, status=(numbers.random(300) < 0.05).astype(np.uint8))
    resolutions = (
        Resolution(side_px=16, share=3, buckets_px=((16, 16), (24, 8))),
        Resolution(side_px=32, share=2, buckets_px=((32, 32),)),
    )
    rest = {"global_batch": 50, "max_pack_tokens": 256, "text_drop": 0.2, "image_to_text_share": 0.3}
    off = DataSource(name="off", shards=("y",), share=0)
    only = DataSource(name="only", shards=("x",), share=4)
    for source in ({"shards": ("x",)}, {"sources": (only,)}, {"sources": (off, only)}):
        plan = Plan(3, index, DataSection(resolutions=resolutions, **source, **rest))
        digest = hashlib.sha256()
        for step in (0, 1, 17, 123_456):
            batch = plan.batch(step)
            for name in ("samples", "side_px", "bucket_px", "epoch", "is_caption_dropped", "is_image_to_text"):
                digest.update(getattr(batch, name).tobytes())
        assert digest.hexdigest()[:32] == "85445578a7bf943fc75e9f90cdda211b"
        assert plan.hash == "3355143f01dccf7864dc11f6e17261da"
    assert Plan(3, index, DataSection(resolutions=resolutions, shards=("x",), **rest)).images_by_source(4) == {}


def test_the_hash_covers_names_shares_and_whose_shards_they_are() -> None:
    index = make_index([40] * 3, [40] * 2, [40] * 2)
    data = make_data((2, 1))
    division = index.divided([1, 2])
    renamed = tuple(dataclasses.replace(source, name=f"t{n}") for n, source in enumerate(data.sources))
    hashes = [
        Plan(0, used, changed).hash
        for used, changed in (
            (division, data),
            (division, make_data((1, 2))),
            (division, dataclasses.replace(data, sources=renamed)),
            (index.divided([2, 1]), data),
            (index.divided([3]), make_data((1,))),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert Plan(0, index.divided([1, 2]), data).hash == hashes[0]


@pytest.fixture
def source_section(data_set: list[str], make_config, tmp_path: Path) -> Callable[..., DataSection]:
    """Makes a data section whose sources take the shards of these numbers, with an index folder of its own."""

    def make(share_and_shards: dict[str, tuple[int, list[int]]], **changes: object) -> DataSection:
        sources = tuple(
            DataSource(name=name, share=share, shards=tuple(data_set[number] for number in numbers))
            for name, (share, numbers) in share_and_shards.items()
        )
        return make_config(sources=sources, **{"index_dir": str(tmp_path / "index")} | changes).data

    return make


def test_the_index_of_a_run_knows_its_sources(data_set, source_section, tmp_path: Path) -> None:
    data = source_section({"late": (1, [2]), "off": (0, [1]), "early": (3, [0, 1])})
    index = training_index(data)
    assert [entry.path for entry in index.shards] == [data_set[number] for number in (2, 0, 1)]
    assert index.sources == (range(9), range(9, 21))
    # The digest covers the samples and not the sources.
    assert index.hash == build_index([data_set[number] for number in (2, 0, 1)], tmp_path / "other").hash
    whole = training_index(source_section({"all": (1, [0, 1, 2])}))
    assert whole.sources == (range(21),)


def test_the_default_index_of_sources_is_not_that_of_the_first(data_set, make_config, tmp_path: Path) -> None:
    shards = [shutil.copy2(path, tmp_path) for path in data_set[:2]]
    sources = tuple(DataSource(name=name, share=1, shards=(path,)) for name, path in zip("ab", shards, strict=True))
    training_index(make_config(sources=sources).data)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bitdance_index_a_b", "00000.tar", "00001.tar"]


def test_a_shard_of_two_sources_and_a_missing_one_are_refused_by_name(data_set, source_section) -> None:
    shared = source_section({"a": (1, [0, 1]), "b": (1, [2, 1])})
    with pytest.raises(DataError, match=f"shard {data_set[1]} is in source 'a' and in source 'b', so its images"):
        training_index(shared)
    gone = source_section({"a": (1, [0]), "b": (1, [1])})
    gone = dataclasses.replace(
        gone, sources=(gone.sources[0], dataclasses.replace(gone.sources[1], shards=("no.tar",)))
    )
    with pytest.raises(DataError, match="shards of source 'b': shard 'no.tar' .* does not exist"):
        training_index(gone)


@pytest.fixture(params=["a folder", "a file"])
def other_spelling(request, data_set, tmp_path: Path) -> str:
    """Another path to the second shard."""
    shard = Path(data_set[1])
    if request.param == "a folder":
        (tmp_path / "linked").symlink_to(shard.parent)
        return str(tmp_path / "linked" / shard.name)
    (tmp_path / "linked.tar").symlink_to(shard)
    return str(tmp_path / "linked.tar")


def test_a_shard_of_two_sources_is_refused_by_whatever_paths(data_set, source_section, other_spelling: str) -> None:
    data = source_section({"a": (1, [0, 1]), "b": (1, [2])})
    data = dataclasses.replace(
        data, sources=(data.sources[0], dataclasses.replace(data.sources[1], shards=(other_spelling,)))
    )
    message = rf"shard {other_spelling} is in source 'a' \(as {data_set[1]}\) and in source 'b', so its images"
    with pytest.raises(DataError, match=message):
        training_index(data)


@pytest.mark.parametrize("mode", ["shards", "sources", "stream"])
def test_held_out_shards_that_are_trained_on_are_refused(
    data_set, make_config, other_spelling: str, tmp_path: Path, mode: str
) -> None:
    """Before anything is read, and by whatever path."""
    sources = tuple(DataSource(name=name, share=1, shards=(path,)) for name, path in zip("ab", data_set, strict=False))
    settings = {
        "shards": {"shards": tuple(data_set[:2])},
        "sources": {"sources": sources},
        "stream": {"shards": ("pipe:cat no.tar", *data_set[:2]), "mode": "stream"},
    }
    config = make_config(**{"index_dir": str(tmp_path / "index")} | settings[mode])
    for path, spelled in ((data_set[1], ""), (other_spelling, rf" \(as {data_set[1]}\)")):
        holding = dataclasses.replace(config, evaluate=EvaluateSection(shards=(data_set[2], path)))
        message = rf"evaluate.shards: {path} is trained on as well{spelled}, .*Hold other shards out"
        with pytest.raises(ConfigError, match=message):
            run_index(holding)
        assert not (tmp_path / "index").exists()
    holding = dataclasses.replace(config, evaluate=EvaluateSection(shards=(data_set[2],)))
    assert (run_index(holding) is None) == (mode == "stream")


def test_held_out_shards_in_the_folder_of_the_others_are_indexed_once(
    data_set, make_config, tmp_path: Path, scanned: list[str]
) -> None:
    """However often a run starts: the two lists have one folder, and neither takes the place of the other."""
    shards = [shutil.copy2(path, tmp_path) for path in data_set]
    config = make_config(shards[:2])
    config = dataclasses.replace(config, evaluate=EvaluateSection(shards=(shards[2],), images=5))
    for _ in range(2):
        assert len(run_index(config)) == 12 and len(labelled_index(held_out_run(config))) == 9
        assert scanned == shards
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {".bitdance_index"}
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, index_dir=str(tmp_path / "index")))
    assert labelled_index(held_out_run(elsewhere)).table.parent == tmp_path / "index" / "held_out"


def test_an_index_that_another_job_replaced_is_refused(data_set, source_section, monkeypatch) -> None:
    data = source_section({"a": (1, [0]), "b": (1, [1])})
    monkeypatch.setattr(
        "bitdance_scale.train.shared_index.open_index", lambda table, **_: build_index(data_set, table.parent)
    )
    with pytest.raises(DataError, match="has replaced this run's index while it started. Start again"):
        training_index(data)
