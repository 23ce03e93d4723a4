"""Bit shards: made by one process or two, refused where they do not fit, and trained on as images are, bit for bit."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from bitdance_scale.cli import encode_shards
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.data import bit_shards
from bitdance_scale.data.augment import Augmentation, stored_views
from bitdance_scale.data.bit_shards import BitStore, read_tables, recipe, shard_file
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.errors import DataError, UnreadableError
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from bitdance_scale.sequence.tokens import load_text_tokenizer
from bitdance_scale.train import encode_bits
from bitdance_scale.train.process import EXIT_REFUSED
from bitdance_scale.train.shared_index import labelled_index, training_index
from bitdance_scale.vision.tokenizer import VisionTokenizer
from tests.distributed.small_demo import small_demo

ROOT = Path(__file__).parents[2]
DEMO = CONFIGS / "demo.toml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """Of the demo, on 60 images in two shards, one of which is broken and three of which a filter leaves out."""
    folder = tmp_path_factory.mktemp("material")
    overrides = small_demo(folder, num_steps=3, save_every=100)
    shard = sorted((folder / "shards").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    place = content.index(b"\xff\xd8\xff")
    content[place : place + 200] = bytes(200)
    shard.write_bytes(content)
    return [*overrides, "data.filters=[{column='aspect', max=1.9}]", "data.max_skipped_share=0.5"]


@pytest.fixture(scope="module")
def bits(overrides: list[str], tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bits")
    assert encode_shards.main([str(DEMO), *overrides, "--nproc", "1", "--out", str(folder)]) == 0
    return folder


def config_of(overrides: Sequence[str]) -> RunConfig:
    return load_config(DEMO, overrides)


def run(command: Sequence[object], num_processes: int) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_fifty_steps_of_bits_are_those_of_images(overrides: list[str], bits: Path) -> None:
    config = config_of(overrides)
    index, text = training_index(config.data), load_text_tokenizer(config.text, config.vision.block_tokens)
    vision = VisionTokenizer(config.vision, CPU)
    with_bits = config_of([*overrides, f"data.bits_dir={bits}"])
    num_skipped = 0
    with Loader(config, text, index, 0, 2) as images, Loader(with_bits, text, index, 0, 2) as encoded:
        for _ in range(50):
            for one, other in zip(images.next_step().packs, encoded.next_step().packs, strict=True):
                assert (one.sample_errors, one.state) == (other.sample_errors, other.state) and other.images == []
                np.testing.assert_array_equal(one.pack.token_ids, other.pack.token_ids)
                np.testing.assert_array_equal(one.pack.sample_keys, other.pack.sample_keys)
                expected = np.concatenate(vision.encode([torch.tensor(image) for image in one.images]))
                np.testing.assert_array_equal(other.pack.vision_bits, expected)
                num_skipped += one.num_skipped
    assert num_skipped > 0


def test_views_are_encoded_and_drawn(overrides: list[str], tmp_path: Path) -> None:
    """What a step on bits gets is the encoding of the view that the seed of the run draws among those stored."""
    augment = ["data.augment.flip=0.5", "data.augment.crop=0.5", "data.augment.bits_crops=3", "data.resize=adm"]
    one_resolution = ["data.resolutions=[{side_px=64, share=1, buckets_px=[[64, 64]]}]"]
    config = config_of([*overrides, *augment, *one_resolution, f"data.bits_dir={tmp_path}", "run.seed=5"])
    index, text = training_index(config.data), load_text_tokenizer(config.text, config.vision.block_tokens)
    vision = VisionTokenizer(config.vision, CPU)
    assert encode_bits.run_encode(config, tmp_path, 4) == 0
    augmentation, reader = Augmentation(config.data.augment, config.run.seed), ShardReader()
    drawn = set()
    with Loader(config, text, index, 0, 1) as loader:
        for step in range(2):
            epochs = dict(zip(*(values.tolist() for values in _samples_and_epochs(loader, step)), strict=True))
            for loaded in loader.next_step().packs:
                images = []
                for sample in loaded.pack.sample_keys.tolist():
                    number = augmentation.stored_view(epochs[sample], sample)
                    drawn.add(number)
                    view = stored_views(config.data.augment, sample)[number]
                    data, size_px = reader.image(index, sample), index.size_px(sample)
                    images.append(torch.tensor(decode_image(data, size_px, (64, 64), size_px, "adm", view)))
                np.testing.assert_array_equal(loaded.pack.vision_bits, np.concatenate(vision.encode(images)))
    assert drawn == {0, 1, 2, 3, 4}


def _samples_and_epochs(loader: Loader, step: int) -> tuple[np.ndarray, np.ndarray]:
    batch = loader.plan.batch(step)
    assert len(set(batch.samples.tolist())) == len(batch), "the test wants every sample once"
    return batch.samples, batch.epoch


@pytest.mark.large
def test_a_run_on_bits_learns_the_same(overrides: list[str], bits: Path, tmp_path: Path) -> None:
    losses = []
    for name, more in (("images", []), ("bits", [f"data.bits_dir={bits}"])):
        done = run(["pipelines/pretrain.py", DEMO, *overrides, f"run.root={tmp_path}", f"run.name={name}", *more], 1)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([(point.loss, point.grad_norm) for point in read_metrics(tmp_path / name / METRICS_FILE)])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_two_processes_share_the_work_and_go_on(overrides: list[str], bits: Path, tmp_path: Path) -> None:
    shutil.copy2(bits / shard_file(0), tmp_path / shard_file(0))
    (tmp_path / shard_file(1)).write_bytes(b"half a shard")
    done = run(["tools/encode_shards.py", DEMO, *overrides, "--out", tmp_path], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 2 shards are there already" in done.stderr and "It is made again" in done.stderr
    assert done.stderr.count("1 of 1 shards, encoded") == 1
    for path in sorted(bits.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_other_bits_are_refused(overrides: list[str], bits: Path, tmp_path: Path) -> None:
    config = config_of(overrides)
    index = training_index(config.data)
    wanted = recipe(config.data, config.vision)
    for change, message in (
        ({"block_side": 8}, "made with block_side = 4, now it is 8"),
        ({"tokenizer": "0"}, "made with tokenizer = "),
        ({"max_upscale": 2.0}, "made with max_upscale = 1.0, now it is 2.0"),
        ({"precision": "tf32"}, "made with precision = float32, now it is tf32"),
    ):
        with pytest.raises(DataError, match=f"{message}.*Run `bitdance encode`"):
            BitStore(bits, index, wanted | change)
    with pytest.raises(DataError, match="no bits are there"):
        BitStore(tmp_path, index, wanted)
    other = training_index(config_of([*overrides, f"data.index_dir={tmp_path}"]).data)
    other.hash = "another"
    with pytest.raises(DataError, match="of the data set with index .* not another"):
        BitStore(bits, other, wanted)


def test_damage_is_a_skipped_sample_and_what_was_left_out_is_refused(
    overrides: list[str], bits: Path, tmp_path: Path
) -> None:
    config = config_of(overrides)
    index = training_index(config.data)
    folder = shutil.copytree(bits, tmp_path / "bits")
    _, tables = read_tables(folder / shard_file(0))
    table = tables[64]
    first = int(np.flatnonzero(table["error_code"] == bit_shards.HAS_BITS)[0])
    left_out = int(np.flatnonzero(table["error_code"] == bit_shards.NOT_ENCODED)[0])
    with open(folder / shard_file(0), "r+b") as file:
        file.seek(int(table["start"][first]) + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    store = BitStore(folder, index, recipe(config.data, config.vision))
    with pytest.raises(SampleError, match="they are damaged") as fault:
        store.read(first, 64)
    assert fault.value.cause == ErrorCause.READ_FAILED
    with pytest.raises(DataError, match="has no bits for resolution 64 px: filters left it out"):
        store.read(left_out, 64)


def test_bits_that_cannot_be_read_now_are_not_made_again(
    overrides: list[str], bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = config_of(overrides), Path(shutil.copy2(bits / shard_file(0), tmp_path))
    encoder = encode_bits.Encoder(
        config, training_index(config.data), VisionTokenizer(config.vision, CPU), tmp_path, num_verified=0
    )
    content = path.read_bytes()

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("tarfile.open", fail)
        with pytest.raises(UnreadableError, match=f"{path}: cannot be read now .Input/output error."):
            encoder.is_done(0)
    assert path.read_bytes() == content and encoder.is_done(0)


def test_bits_that_lack_samples_are_refused_before_the_first_step_and_completed(
    overrides: list[str], bits: Path, tmp_path: Path
) -> None:
    """The filters of the bits leave out what those of the run keep."""
    folder = shutil.copytree(bits, tmp_path / "bits")
    wider = [*overrides, "data.filters=[]", f"data.bits_dir={folder}"]
    config = config_of(wider)
    refusal = (
        r"bits.json: \d+ of the \d+ samples .* were left out .* data.filters were \['-inf <= aspect <= 1.9, missing"
    )
    with pytest.raises(DataError, match=refusal):
        labelled_index(config)
    command = [sys.executable, "pipelines/pretrain.py", DEMO, *wider, f"run.root={tmp_path}", "run.name=run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == EXIT_REFUSED and re.search(refusal, done.stderr), done.stderr[-3000:]
    assert not (tmp_path / "run" / METRICS_FILE).exists()

    index = training_index(config.data)
    plan = Plan(config.run.seed, index, config.data)
    incomplete, before = [], {}
    for row in range(len(index.shards)):
        path, samples = folder / shard_file(row), index.shard_samples(row)
        before[row] = path.stat().st_ino
        for side_px, table in read_tables(path)[1].items():
            is_drawn = plan.buckets_px(np.arange(samples.start, samples.stop), side_px)[:, 0] > 0
            if np.any(is_drawn & (table["error_code"] == bit_shards.NOT_ENCODED)):
                incomplete.append(row)
    assert incomplete and encode_bits.run_encode(config, folder, 0) == 0
    assert {row for row in before if (folder / shard_file(row)).stat().st_ino != before[row]} == set(incomplete)
    for fitting in (config, config_of([*overrides, f"data.bits_dir={folder}"])):
        assert len(labelled_index(fitting)) == len(index)
    # With the former filters nothing lacks, and nothing is made again.
    made = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    assert encode_bits.run_encode(config_of(overrides), folder, 0) == 0
    assert {path.name: path.stat().st_ino for path in folder.glob("*.tar")} == made


def test_an_image_that_cannot_be_read_leaves_its_shard_undone(overrides: list[str], tmp_path: Path) -> None:
    """It may be there again tomorrow; the bits would never be."""
    config = config_of(overrides)
    index = training_index(config.data)
    moved = tmp_path / "moved.tar"
    shutil.copy2(index.shards[0].path, moved)
    encoder = encode_bits.Encoder(config, index, VisionTokenizer(config.vision, CPU), tmp_path, num_verified=0)
    try:
        os.truncate(index.shards[0].path, 2000)
        with pytest.raises(DataError, match="Restore the shard and run again: what is encoded stays"):
            encoder.encode(0)
    finally:
        shutil.copy2(moved, index.shards[0].path)
    assert not list(tmp_path.glob("0*.tar"))


def test_a_shard_that_cannot_be_read_leaves_the_others(
    overrides: list[str], bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read = config_of(overrides), ShardReader.image

    def image(reader: ShardReader, index: Index, sample: int) -> bytes:
        if sample in index.shard_samples(0):
            raise SampleError(ErrorCause.READ_FAILED, "Input/output error")
        return read(reader, index, sample)

    with monkeypatch.context() as patched:
        patched.setattr(ShardReader, "image", image)
        with pytest.raises(DataError, match="Input/output error. Restore the shard and run again"):
            encode_bits.run_encode(config, tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == [shard_file(1)]
    assert encode_bits.run_encode(config, tmp_path, 0) == 0
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in bits.iterdir())


def test_bits_that_encoding_does_not_give_again_are_removed(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(overrides)
    index, vision = training_index(config.data), VisionTokenizer(config.vision, CPU)
    monkeypatch.setattr(VisionTokenizer, "is_of", lambda *details: False)
    with pytest.raises(DataError, match="gives other bits than together with others.*It was removed: run again"):
        encode_bits.Encoder(config, index, vision, tmp_path, num_verified=30).encode(0)
    assert not list(tmp_path.iterdir())
