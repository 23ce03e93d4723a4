"""Two ranks train the tokenizer as one does."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.demo.shards import write_shards
from bitdance_scale.errors import DataError
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, read_records
from bitdance_scale.train.process import EXIT_REFUSED, EXIT_REQUEUE
from bitdance_scale.train.tokenizer_records import TokenizerEvaluation, TokenizerMetrics
from tests.distributed.spawn import run_ranks
from tests.unit.data.small_data import sample_members, write_tar

DEMO = CONFIGS / "demo_tokenizer.toml"


def train(rank: int, settings: list[str]) -> int | str:
    """Exit code of a run, or what it was refused for."""
    from bitdance_scale.train.tokenizer import run_tokenizer

    try:
        return run_tokenizer(load_config(DEMO, settings, TokenizerConfig))
    except DataError as error:
        return str(error)


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    write_shards(tmp_path / "train", num_images=16, per_shard=8, seed=0)
    write_shards(tmp_path / "held_out", num_images=4, per_shard=4, seed=1)
    # Without flips, which each rank draws for its own images, the two runs compute the same sums.
    return [
        f"run.output={tmp_path / 'weights'}", f'data.shards=["{tmp_path / "train"}"]',
        f'evaluate.shards=["{tmp_path / "held_out"}"]',
        "run.dtype=float32", "run.steps=3", "observe.log_every_steps=1", "autoencoder.channel_mult=[1, 1]",
        "data.sizes_px=[[16, 16]]", "data.images_px=2048", "optim.warmup_steps=0", "optim.lr=1e-4",
        "quantiser.flip_max=0.0", "observe.wandb_mode=disabled", "evaluate.sizes_px=[[16, 16]]",
    ]  # fmt: skip


def test_gradients_of_two_ranks_are_those_of_one(settings: list[str], tmp_path: Path):
    norms = {}
    for num_ranks in (1, 2):
        root = tmp_path / f"runs_{num_ranks}"
        assert run_ranks(num_ranks, train, [*settings, f"run.root={root}"]) == [0] * num_ranks
        records = read_records(root / "demo_tokenizer" / METRICS_FILE, TokenizerMetrics)
        norms[num_ranks] = [record.grad_norm for record in records]
    # Step 1 differs by float32 summation order alone. Later a latent near zero may change its sign with the last bit of
    # the weights (Adam's first steps have the full rate whatever the gradient), hence the wider bound.
    np.testing.assert_allclose(norms[2][0], norms[1][0], rtol=1e-5)
    np.testing.assert_allclose(norms[2], norms[1], rtol=0.05)


def test_a_damaged_image_ends_no_rank_that_has_one_image_a_step(settings: list[str], tmp_path: Path):
    samples = {f"{number}": sample_members(40, 40, "a", number) for number in range(4)}
    samples["3"]["jpg"] = samples["3"]["jpg"][:-300]
    write_tar(tmp_path / "damaged" / "0.tar", samples)
    settings = [*settings, f'data.shards=["{tmp_path / "damaged"}"]', "data.images_px=512"]
    results = {}
    for num_ranks in (1, 2):
        root = tmp_path / f"runs_{num_ranks}"
        assert run_ranks(num_ranks, train, [*settings, f"run.root={root}"]) == [0] * num_ranks
        records = read_records(root / "demo_tokenizer" / METRICS_FILE, TokenizerMetrics)
        assert [record.images for record in records] == [2, 4, 6]
        results[num_ranks] = [(record.skipped_samples, record.grad_norm) for record in records]
    counts, norms = zip(*results[1], strict=True)
    other_counts, other_norms = zip(*results[2], strict=True)
    # The four images are those of the first two steps.
    assert counts == other_counts and counts[1] >= 1
    # As above.
    np.testing.assert_allclose(other_norms[0], norms[0], rtol=1e-5)
    np.testing.assert_allclose(other_norms, norms, rtol=0.05)


def train_with_a_stop(rank: int, settings: list[str], last_step: int) -> int:
    """Like `train`, but one rank is sent SIGTERM during step `last_step`."""
    from bitdance_scale.train.tokenizer import TokenizerJob

    take_step = TokenizerJob.take_step

    def take_and_signal(job: TokenizerJob) -> bool:
        if rank == 1 and job.step + 1 == last_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(job)

    TokenizerJob.take_step = take_and_signal
    return train(rank, settings)


def test_a_run_that_is_stopped_goes_on_bit_for_bit(settings: list[str], tmp_path: Path):
    # Checkpoints of every step: the one of the stop is not special.
    settings = [*settings, "run.steps=5", "quantiser.flip_max=0.1", "optim.lr=1e-3"]
    whole, stopped = (
        [*settings, f"run.root={tmp_path / name}", f"run.output={tmp_path / name}_weights"] for name in "ab"
    )
    assert run_ranks(2, train, whole) == [0, 0]
    assert run_ranks(2, train_with_a_stop, stopped, 2) == [EXIT_REQUEUE] * 2
    assert not (tmp_path / "b_weights").exists()
    assert run_ranks(2, train, stopped) == [0, 0]
    files = [(tmp_path / f"{name}_weights" / "ae.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    records = [read_records(tmp_path / name / "demo_tokenizer" / METRICS_FILE, TokenizerMetrics) for name in "ab"]
    assert [record.step for record in records[1]] == [1, 2, 3, 4, 5]
    for one, other in zip(*records, strict=True):
        assert (one.loss, one.grad_norm, one.lr, one.images) == (other.loss, other.grad_norm, other.lr, other.images)
    # A run that is complete makes its last evaluation and the weights again where they are missing.
    shutil.rmtree(tmp_path / "b_weights")
    evaluations = tmp_path / "b" / "demo_tokenizer" / EVALUATION_FILE
    before = read_records(evaluations, TokenizerEvaluation)
    evaluations.write_text("".join(record.to_json() + "\n" for record in before[:-1]))
    assert run_ranks(2, train, stopped) == [0, 0]
    assert (tmp_path / "b_weights" / "ae.safetensors").read_bytes() == files[0]
    assert read_records(evaluations, TokenizerEvaluation) == before and before[-1].step == 5


def train_without_room(rank: int, settings: list[str]) -> int:
    """Exit code of a run whose weights cannot be written."""
    from bitdance_scale.train import tokenizer
    from bitdance_scale.train.process import run_process

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "ae.safetensors")

    tokenizer.save_weights = full
    return run_process(lambda: train(rank, settings))


def test_weights_that_cannot_be_written_end_every_rank(settings: list[str], tmp_path: Path):
    averaged = ["optim.average_decay=0.5", "parallel.shard_optimizer=true", "evaluate.weights=averaged"]
    settings = [*settings, *averaged, "run.steps=1", f"run.root={tmp_path / 'runs'}"]
    for _ in ("at the end of the run", "in a run that is complete"):
        assert run_ranks(2, train_without_room, settings, timeout_s=60.0) == [EXIT_REFUSED] * 2
    assert not (tmp_path / "weights").exists()


def test_data_that_does_not_go_on_is_refused(settings: list[str], tmp_path: Path):
    settings = [*settings, f"run.root={tmp_path / 'runs'}"]
    assert run_ranks(1, train, settings) == [0]
    with pytest.raises(AssertionError, match="was trained with other data.shards, data.sizes_px"):
        run_ranks(1, train, [*settings, "run.steps=4", "data.images_px=1024"])


def test_missing_shards_end_every_rank(settings: list[str], tmp_path: Path):
    (tmp_path / "train" / "00001.tar").write_bytes((tmp_path / "train" / "00001.tar").read_bytes()[:3000])
    messages = run_ranks(2, train, [*settings, f"run.root={tmp_path / 'runs'}"])
    assert all("00001.tar" in message for message in messages)
