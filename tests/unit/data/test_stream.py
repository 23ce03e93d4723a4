"""The loader of streams, against the loader with an index on the same tars."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.config.data_schema import CaptionChoice, DataFilter, DataSource
from bitdance_scale.data.captions import CaptionSource, CaptionStatus
from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.loader import LoadedStep, Loader
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.stream import StreamLoader
from bitdance_scale.data.stream_sampling import SourceStream, read_sample
from bitdance_scale.errors import CheckpointError, ConfigError, DataError
from bitdance_scale.parallel.agreement import from_all_ranks
from tests.unit.data.small_data import encode_image, sample_members, write_tar

PLAIN = {"text_drop": 0.0, "mode": "stream", "stream_buffer": 4}


@pytest.fixture
def make_stream(make_config, data_set):
    """Makes the configuration of a run on streams; arguments change its data section."""
    return lambda **data: make_config(**({"shards": tuple(data_set)} | PLAIN | data))


def samples_of(step: LoadedStep) -> list[tuple[str, bytes]]:
    """(grid and token ids, image) of the samples of a step, which are the same whatever their keys are."""
    found = []
    for loaded in step.packs:
        pack = loaded.pack
        for document, image in enumerate(loaded.images):
            tokens = pack.token_ids[pack.document_ids == document].tolist()
            found.append((json.dumps([pack.sample_grids[document].tolist(), tokens]), image.tobytes()))
    return found


def test_samples_are_those_of_the_index(make_stream, make_config, data_set, tokenizer, tmp_path):
    """Every sample that the streams give is one that the index gives, with its caption, bucket and pixels."""
    index = build_index(data_set, tmp_path / "index")
    with Loader(make_config(data_set, text_drop=0.0), tokenizer, index, 0, 1) as loader:
        expected = {sample for _ in range(12) for sample in samples_of(loader.next_step())}
    with StreamLoader(make_stream(), tokenizer, 0, 1) as streams:
        steps = [streams.next_step() for _ in range(12)]
    found = {sample for step in steps for sample in samples_of(step)}
    assert found <= expected and len(found) > len(expected) // 2
    assert all(step.images_by_resolution == {16: 6, 32: 4} and not step.sample_errors for step in steps)
    for step in steps:
        sides = Counter(len(image) for _, image in samples_of(step))
        assert sum(count for size, count in sides.items() if size == 32 * 32 * 3) == 4
        assert all(pack.pack.num_positions <= 256 for pack in step.packs)


def test_a_pass_over_the_streams_leaves_out_nothing(make_stream, tokenizer):
    """With one resolution that all samples fit, 21 samples in 42 places come about twice each."""
    config = make_stream(global_batch=21, stream_buffer=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, resolutions=config.data.resolutions[:1]))
    with StreamLoader(config, tokenizer, 0, 1) as streams:
        keys = [key for _ in range(4) for pack in streams.next_step().packs for key in pack.pack.sample_keys.tolist()]
    assert len(set(keys)) == 21


def test_captions_by_share_filters_and_sources(make_stream, tokenizer, tmp_path):
    def record(number: int) -> bytes:
        texts = {"long": [f"first {number}", f"second {number}"], "punsafe": number / 10}
        return json.dumps(texts | {"width": 40, "height": 40}).encode()

    paths = []
    for source in range(2):
        members = {
            f"{number}": {"jpg": encode_image(40, 40, number), "json": record(number), "txt": b"short %d" % number}
            for number in range(10)
        }
        paths.append(str(write_tar(tmp_path / f"{source}.tar", members)))
    config = make_stream(
        shards=(),
        sources=(
            DataSource(name="a", shards=(paths[0],), share=4),
            DataSource(name="b", shards=(f"pipe:cat {paths[1]}",), share=1),
        ),
        captions=(CaptionChoice(source="json:long", share=3), CaptionChoice(source="caption")),
        filters=(DataFilter(column="punsafe", max=0.45), DataFilter(column="short_side_px", min=8)),
        global_batch=20,
    )
    kinds: Counter[str] = Counter()
    numbers: set[str] = set()
    with StreamLoader(config, tokenizer, 0, 1) as streams:
        for _ in range(10):
            step = streams.next_step()
            for loaded in step.packs:
                for document in range(len(loaded.images)):
                    ids = loaded.pack.token_ids[loaded.pack.document_ids == document].tolist()
                    found = re.search(r"(first|second|short) (\d)", tokenizer.decode(ids))
                    assert found is not None
                    kinds[found[1]] += 1
                    numbers.add(found[2])
    assert step.images_by_source == {"a": 160, "b": 40}
    assert numbers == set("01234"), "punsafe of 5 and more is left out"
    # 200 draws of 3/8, 3/8 and 1/4, with a standard deviation of 7.
    assert abs(kinds["first"] - 75) < 35 and abs(kinds["second"] - 75) < 35 and abs(kinds["short"] - 50) < 30


def test_replicas_read_streams_of_their_own(make_stream, data_set):
    config = make_stream()
    (source,) = config.data.active_sources
    urls = [f"{number}.tar" for number in range(7)]
    passes = []
    for rank, count in ((0, 4), (1, 3)):
        stream = SourceStream(urls, source, config.data, (rank, 2), "seed")
        passes.append(list(itertools.islice(stream._next_urls(), 2 * count)))
    for number in range(2):
        taken = [passes[0][4 * number : 4 * number + 4], passes[1][3 * number : 3 * number + 3]]
        assert sorted(itertools.chain(*taken)) == urls, "all of them once per pass"
    assert passes[0][:4] != passes[0][4:], "in another order"


def test_the_mix_over_replicas_is_exact(make_stream, tokenizer):
    loaders = [StreamLoader(make_stream(stream_buffer=1), tokenizer, rank, 2) for rank in range(2)]
    for _ in range(3):
        steps = [loader.next_step() for loader in loaders]
        assert [len(samples_of(step)) for step in steps] == [5, 5]
        assert sum(len(image) == 32 * 32 * 3 for step in steps for _, image in samples_of(step)) == 4
    for loader in loaders:
        loader.close()


def test_packs_are_filled_up_without_targets(make_stream, tokenizer):
    with StreamLoader(make_stream(), tokenizer, 0, 1) as streams:
        step = streams.next_step()
        filled = streams.filled(step, len(step.packs) + 2)
    assert len(filled.packs) == len(step.packs) + 2
    assert [pack.is_last_in_step for pack in filled.packs] == [False] * (len(filled.packs) - 1) + [True]
    assert {pack.num_packs_in_step for pack in filled.packs} == {len(filled.packs)}
    empty = filled.packs[-1]
    assert len(empty.images) == 1 and not empty.pack.sample_predicts.any()
    assert samples_of(filled)[: len(samples_of(step))] == samples_of(step)


def test_the_same_run_gives_the_same_steps(make_stream, tokenizer):
    runs = []
    for threads in (1, 3):
        with StreamLoader(make_stream(read_threads=threads, prefetch_steps=threads), tokenizer, 0, 1) as streams:
            runs.append([samples_of(streams.next_step()) for _ in range(5)])
    assert runs[0] == runs[1]


def test_skipping_resumes_exactly_and_restarting_does_not(make_stream, tokenizer):
    for resume in ("skip", "restart"):
        config = make_stream(stream_resume=resume)
        with StreamLoader(config, tokenizer, 0, 1) as streams:
            steps = [streams.next_step() for _ in range(5)]
        state = LoaderState.from_dict(json.loads(json.dumps(steps[1].state.to_dict())))
        with StreamLoader(config, tokenizer, 0, 1, state) as streams:
            resumed = [streams.next_step() for _ in range(3)]
        assert [step.step for step in resumed] == [2, 3, 4]
        is_same = [samples_of(step) for step in resumed] == [samples_of(step) for step in steps[2:]]
        assert is_same == (resume == "skip")


def test_what_is_skipped_is_not_counted_again(make_stream, data_set, tokenizer, tmp_path):
    empty = write_tar(tmp_path / "empty.tar", {"empty": {"txt": b"no image"}})
    config = make_stream(shards=(*data_set, str(empty)), stream_resume="skip")
    steps, totals = [], []
    with StreamLoader(config, tokenizer, 0, 1) as streams:
        for _ in range(15):
            steps.append(streams.next_step())
            totals.append([counter.totals for counter in streams.error_counters])
    with StreamLoader(config, tokenizer, 0, 1, steps[8].state) as streams:
        resumed = [streams.next_step() for _ in range(6)]
        counted = [counter.totals for counter in streams.error_counters]
    assert [step.sample_errors for step in resumed] == [step.sample_errors for step in steps[9:]]
    assert min(totals[8][1][1], counted[1][1]) >= 2, "the bad sample is met before the resume and after it"
    assert counted == [
        (all_read - read, all_skipped - skipped)
        for (all_read, all_skipped), (read, skipped) in zip(totals[14], totals[8], strict=True)
    ]


def test_samples_that_filters_leave_out_have_been_read(make_stream, tokenizer, tmp_path):
    """Of 20 samples the filter keeps 2; one of these cannot be decoded, and a 21st, the last, has no image."""
    samples = {
        f"{number:02d}": {
            "jpg": encode_image(40, 40, number)[: -40 if number == 1 else None],
            "json": json.dumps({"width": 40, "height": 40, "punsafe": number}).encode(),
            "txt": b"text",
        }
        for number in range(20)
    } | {"99": {"txt": b"no image"}}
    shard = str(write_tar(tmp_path / "0.tar", samples))
    config = make_stream(shards=(shard,), filters=(DataFilter(column="punsafe", max=1.5),))
    with StreamLoader(config, tokenizer, 0, 1) as streams:
        for _ in range(4):
            streams.next_step()
        (num_drawn, num_broken), (num_read, num_lost) = (counter.totals for counter in streams.error_counters)
    # At most 4 samples that were read wait in the buffer, and those of the chunk that filled it.
    assert num_drawn == 40 and 10 <= num_broken <= 30
    assert num_lost >= 19 and num_read // 21 == num_lost


def test_resumes_that_cannot_be_exact_are_refused(make_stream, data_set, tokenizer):
    config = make_stream(stream_resume="skip")
    with StreamLoader(config, tokenizer, 0, 1) as streams:
        state = streams.next_step().state
    with pytest.raises(CheckpointError, match="trained on 1 data-parallel replicas, this run has 2"):
        StreamLoader(config, tokenizer, 0, 2, state)
    with pytest.raises(CheckpointError, match="data.shards now gives"):
        StreamLoader(make_stream(shards=tuple(data_set[:2])), tokenizer, 0, 1, state)
    with pytest.raises(CheckpointError, match="another data.global_batch"):
        StreamLoader(make_stream(global_batch=20), tokenizer, 0, 1, state)


def test_broken_streams_and_samples_are_counted(make_stream, data_set, tokenizer, tmp_path, caplog):
    cut = tmp_path / "cut.tar"
    content = Path(data_set[0]).read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    bad = sample_members(40, 40, "bad", 0)
    bad["jpg"] = bad["jpg"][:-40]
    lying = sample_members(40, 40, "lying", 1) | {"json": b'{"width": 30, "height": 41}'}
    samples = {"bad": bad, "lying": lying, "empty": {"txt": b"no image"}, "good": sample_members(40, 40, "good", 2)}
    other = write_tar(tmp_path / "other.tar", samples)
    config = make_stream(shards=(str(cut), str(other), data_set[1]), max_skipped_share=1.0)
    errors: Counter[str] = Counter()
    num_skipped = 0
    with StreamLoader(config, tokenizer, 0, 1) as streams:
        for _ in range(8):
            step = streams.next_step()
            errors += Counter({str(cause): count for cause, count in step.sample_errors.items()})
            num_skipped += step.num_skipped
        assert num_skipped == streams.error_counter.num_skipped, "of those drawn alone"
        drawn, given = (counter.counts() for counter in streams.error_counters)
    assert given["read_failed"].keys() == {str(cut)}
    assert given["size_mismatch"].keys() == {str(other)}
    assert given["bad_image"].keys() == drawn["bad_image"].keys() == {str(other)}
    assert drawn.keys() == {"bad_image"}
    counted: Counter[str] = Counter()
    for counts in (drawn, given):
        counted.update({cause: sum(shards.values()) for cause, shards in counts.items()})
    assert counted == errors
    assert "broke after" in caplog.text and str(cut) in caplog.text


def test_too_many_broken_streams_stop_the_run(make_stream, data_set, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_scale.data.data_errors.MIN_SAMPLES_FOR_STOP", 20)
    cut = tmp_path / "cut.tar"
    content = Path(data_set[0]).read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    config = make_stream(shards=(str(cut), data_set[1]), max_skipped_share=0.01)
    with (
        StreamLoader(config, tokenizer, 0, 1) as streams,
        pytest.raises(DataError, match=r"read_failed .*cut.tar.*more than data.max_skipped_share=0.01"),
    ):
        for _ in range(20):
            streams.next_step()
            for counter in streams.error_counters:
                counter.check(counter.totals, from_all_ranks)


def test_streams_that_give_nothing_are_an_error(make_stream, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_scale.data.stream_sampling.MAX_FRUITLESS", 64)
    small = str(write_tar(tmp_path / "small.tar", {"a": sample_members(8, 8, "x")}))
    middle = str(write_tar(tmp_path / "middle.tar", {"a": sample_members(20, 20, "x")}))
    cases = [
        (("pipe:false",), (), "no stream gives any sample. Latest: pipe:false"),
        ((small,), (), "fills a bucket of any resolution"),
        ((middle,), (), "fills a bucket of resolution 32 px"),
        ((middle,), (DataFilter(column="punsafe", max=1.0),), "left out by data.filters"),
    ]
    for shards, filters, message in cases:
        with (
            StreamLoader(make_stream(shards=shards, filters=filters), tokenizer, 0, 1) as streams,
            pytest.raises(DataError, match=message),
        ):
            streams.next_step()


def test_replicas_need_streams_and_equal_parts(make_stream, tokenizer):
    with pytest.raises(DataError, match="3 streams for 5 replicas"):
        StreamLoader(make_stream(), tokenizer, 0, 5)
    with pytest.raises(ConfigError, match="must be a multiple of the 3 data-parallel replicas"):
        StreamLoader(make_stream(), tokenizer, 0, 3)
    with StreamLoader(make_stream(stream_resampled=True), tokenizer, 4, 5) as streams:
        assert len(samples_of(streams.next_step())) == 2


def test_a_loader_whose_command_hangs_can_be_closed(make_stream, tokenizer):
    streams = StreamLoader(make_stream(shards=("pipe:sleep 600 | cat",)), tokenizer, 0, 1)
    streams.close()
    with pytest.raises(ValueError, match="is closed"):
        streams.next_step()


def test_keys_are_those_of_noise(make_stream, tokenizer):
    with StreamLoader(make_stream(), tokenizer, 0, 1) as streams:
        keys = np.concatenate([pack.pack.sample_keys for pack in streams.next_step().packs])
    assert keys.dtype == np.int64 and (keys >= 0).all()


def test_a_sample_of_a_stream_has_one_jpeg_and_parts_of_its_key():
    jpg = encode_image(20, 30)
    sources = [CaptionSource.parse(name) for name in ("key_folder", "key_prefix", "json:label")]
    members = {"__key__": "cats/n01_7", "jpg": jpg, "json": b'{"label": 3}'}
    found = read_sample(members, "a.tar", sources).captions
    assert found == tuple((text, CaptionStatus.USABLE) for text in (b"cats", b"n01", b"3"))
    with pytest.raises(SampleError, match="a .jpg and a .jpeg"):
        read_sample({**members, "jpeg": jpg}, "a.tar", sources)
