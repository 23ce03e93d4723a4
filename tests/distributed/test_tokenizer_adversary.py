"""Tokenizer training with discriminator, noise and averages: any number of ranks, any layout, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR
from bitdance_scale.checkpoint.step_names import step_name
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.observe.metrics import METRICS_FILE, read_records
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.train.tokenizer_records import TokenizerMetrics
from tests.distributed.spawn import run_ranks
from tests.small_tokenizer import ADVERSARY, small_config, small_tokenizer, write_small_shards

NUM_IMAGES = 7
NUM_STEPS = 4
EVERYTHING = (
    *ADVERSARY, "optim.average_decay=0.7", "quantiser.flip_max=0.3", "autoencoder.gan_decoder=true",
    # Steps that are short, so that what rounding does to a step is shorter still.
    "optim.lr=1e-5",
)  # fmt: skip
LAYOUTS = {
    "divided": ("parallel.shard_optimizer=true",),
    "whole": ("parallel.shard_optimizer=false",),
    "recomputed": ("parallel.recompute=blocks",),
    "channels_last": ("parallel.channels_last=true",),
}


def values_of(values: Mapping[str, ShardedValue]) -> dict[str, list[tuple[Any, np.ndarray]]]:
    """Name -> (offsets, values) of the pieces of this rank."""
    return {
        name: [(piece.offsets, piece.tensor.contiguous().numpy().copy()) for piece in value.pieces]
        for name, value in values.items()
    }


def drive(rank: int, layouts: list[str]) -> dict[str, Any]:
    """By layout: (losses of this rank, gradient norms) of every step, and all values after the last."""
    from bitdance_scale.config.parallel_schema import ParallelSection
    from bitdance_scale.parallel.topology import end_process_group, make_topology, start_process_group
    from bitdance_scale.train.tokenizer_networks import TokenizerNetworks
    from bitdance_scale.train.tokenizer_objective import Crops

    start_process_group(timeout_s=60)
    topology = make_topology(ParallelSection())
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(NUM_STEPS, NUM_IMAGES, 3, 16, 16, generator=generator) * 2 - 1
    results = {}
    for layout in layouts:
        networks = TokenizerNetworks(small_config(Path(), *EVERYTHING, *LAYOUTS[layout]), topology.device)
        steps = []
        for step in range(NUM_STEPS):
            slots = range(rank, NUM_IMAGES, topology.data_size)
            crops = Crops(images[step, slots], slots, NUM_IMAGES)
            losses = networks.backward(crops, networks.reconstruct(crops, step), step)
            norms = networks.clip(1.0)
            networks.step(1e-5)
            steps.append(({name: loss.item() for name, loss in losses.items()}, norms))
        values = values_of(networks.model_values()) | values_of(networks.optimizer_values())
        results[layout] = (steps, values, networks.discriminator_updates)
    end_process_group()
    return results


def joined(ranks: list[dict[str, Any]], layout: str) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Sums of the ranks' losses and the norms of every step; all values, which the ranks' pieces cover."""
    steps = []
    for step in range(NUM_STEPS):
        parts = [rank[layout][0][step] for rank in ranks]
        norms = parts[0][1]
        assert all(part[1] == norms for part in parts), "all ranks have the same norms"
        losses = {name: sum(part[0][name] for part in parts) for name in parts[0][0]}
        steps.append(losses | {f"norm of {name}": norm for name, norm in norms.items()})
    values: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, pieces in rank[layout][1].items():
            for offsets, value in pieces:
                assert not any(offsets)
                assert name not in values or np.array_equal(values[name], value), f"ranks differ in {name}"
                values[name] = value
        assert rank[layout][1].keys() == ranks[0][layout][1].keys()
    assert values.keys() == ranks[0][layout][1].keys()
    return steps, values


# Constants of a channel, which a norm takes off again: with 32 channels its groups are single channels. Their gradients
# are 0 but for rounding, and Adam makes whole steps of that.
WITHOUT_GRADIENT = {
    "decoder.adaptive.0.beta.bias", "decoder.adaptive.0.beta.weight", "decoder.conv_in.bias",
    "encoder.down.0.downsample.bias",
}  # fmt: skip


def assert_rounding(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    small = {name.partition(".")[2] for name, value in wanted.items() if name.startswith("exp_avg.") and not (
        np.linalg.norm(value) > 1e-7
    )}  # fmt: skip
    assert small == WITHOUT_GRADIENT
    for name, value in wanted.items():
        if not any(name.endswith(other) for other in WITHOUT_GRADIENT):
            error = float(np.linalg.norm(found[name] - value)) / float(np.linalg.norm(value))
            assert error < tolerance, f"{name}: {error}"


@pytest.fixture(scope="module")
def driven() -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what `drive` returns of every rank."""
    return {1: run_ranks(1, drive, [*LAYOUTS]), 2: run_ranks(2, drive, ["divided", "whole", "channels_last"])} | {
        3: run_ranks(3, drive, ["divided"])
    }


def test_ranks_that_do_not_divide_the_images_take_the_steps_of_one(driven):
    steps, values = joined(driven[1], "divided")
    assert {"l1", "lpips", "commit", "entropy_codebook", "norm of autoencoder"} < steps[0].keys()
    assert "hinge" not in steps[0] and all(step["hinge"] > 0.5 and step["lecam"] > 0 for step in steps[1:])
    assert steps[0]["adversarial"] == 0 and all(step["adversarial"] > 0 for step in steps[1:])
    assert sum(name.startswith("average.") for name in values) == sum(
        name.startswith("decoder.") for name in values
    ) + (sum(name.startswith("encoder.") for name in values))
    assert np.abs(values["discriminator.average_logits"]).min() > 1e-5
    for num_ranks in (2, 3):
        others, other_values = joined(driven[num_ranks], "divided")
        for step, other in zip(steps, others, strict=True):
            assert other == pytest.approx(step, rel=2e-6)
        assert {rank["divided"][2] for rank in driven[num_ranks]} == {NUM_STEPS - 1}
        assert_rounding(other_values, values, 2e-5)


def test_a_divided_optimiser_takes_the_very_steps_of_a_whole_one(driven):
    for num_ranks in (1, 2):
        divided, whole = (joined(driven[num_ranks], layout) for layout in ("divided", "whole"))
        assert divided[0] == whole[0]
        assert all(np.array_equal(divided[1][name], value) for name, value in whole[1].items())
    owned = [sum(map(bool, rank["divided"][1].values())) for rank in driven[2]]
    kept = [sum(map(bool, rank["whole"][1].values())) for rank in driven[2]]
    assert max(owned) < min(kept), "each rank keeps a part"


def test_recomputed_blocks_change_nothing_and_channels_last_rounds(driven):
    steps, values = joined(driven[1], "divided")
    again_steps, again_values = joined(driven[1], "recomputed")
    assert again_steps == steps and all(np.array_equal(again_values[name], value) for name, value in values.items())
    for num_ranks in (1, 2):
        other_steps, other_values = joined(driven[num_ranks], "channels_last")
        for step, other in zip(steps, other_steps, strict=True):
            assert other == pytest.approx(step, rel=2e-6)
        # 2.5e-5 was measured on a processor with AVX-512.
        assert_rounding(other_values, values, 6e-5)


# Runs: the discriminator has a NaN in the third step, and the run is killed in the fifth.
POISONED_STEP, KILLED_STEP, LAST_STEP = 3, 5, 6
RUN = (
    *ADVERSARY, "optim.average_decay=0.7", "quantiser.flip_max=0.3", f"run.steps={LAST_STEP}", "optim.lr=1e-5",
    "checkpoint.every_steps=1", "checkpoint.keep=9",
)  # fmt: skip


def train(rank: int, settings: list[str], kills: bool = False, watches: bool = False) -> Any:
    """Exit code of a run, or with `watches` the values that it begins with."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.tokenizer_schema import TokenizerConfig
    from bitdance_scale.train import tokenizer, tokenizer_objective
    from bitdance_scale.vision.discriminator import DiscriminatorLoss
    from tests.small_tokenizer import DEMO

    job_step, begun, seen = [0], {}, []
    compute, take_step = tokenizer_objective.discriminator_loss, tokenizer.TokenizerJob.take_step

    def poisoned(*arguments: Any) -> DiscriminatorLoss:
        loss = compute(*arguments)
        is_now = rank == int(os.environ["WORLD_SIZE"]) - 1 and job_step[0] == POISONED_STEP and torch.is_grad_enabled()
        return loss._replace(hinge=loss.hinge * torch.nan) if is_now else loss

    def take(job: tokenizer.TokenizerJob) -> bool:
        job_step[0] = job.step + 1
        if not seen:
            seen.append(job.step)
            begun.update(values_of(job.model_values()) | values_of(job.optimizer_values()))
        if kills and job_step[0] == KILLED_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(job)

    tokenizer_objective.discriminator_loss, tokenizer.TokenizerJob.take_step = poisoned, take
    code = tokenizer.run_tokenizer(load_config(DEMO, settings, TokenizerConfig))
    return (code, seen[0], begun) if watches else code


def stored(runs: Path, step: int) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, by its name without the part that says what it is."""
    files = StoredTensors(runs / "demo_tokenizer" / "checkpoints" / step_name(step) / TENSORS_DIR)
    return {
        name.partition(".")[2]: files.read_rows(name, 0, files.index.spec(name).shape[0]).numpy()
        for name in files.index.tensors
    }


def assert_equal(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    differ = [name for name, value in wanted.items() if not np.array_equal(found[name], value)]
    assert not differ


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks: `whole` has not been killed, `killed` has been, after its fourth step."""
    folder = tmp_path_factory.mktemp("adversary")
    write_small_shards(folder)
    assert run_ranks(2, train, settings_in(folder, "whole")) == [0, 0]
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(2, train, settings_in(folder, "killed"), True)
    return folder


def settings_in(folder: Path, name: str) -> list[str]:
    return [*small_tokenizer(folder, *RUN), f"run.root={folder / name}", f"run.output={folder / name}_weights"]


def records_of(runs: Path) -> list[tuple[float, ...]]:
    records = read_records(runs / "demo_tokenizer" / METRICS_FILE, TokenizerMetrics)
    return [
        (line.step, line.loss, line.adversarial, line.hinge, line.lecam, line.grad_norm, line.discriminator_grad_norm)
        for line in records
    ]


def test_a_nan_in_the_discriminator_of_one_rank_changes_neither_network(runs: Path):
    before, after = (stored(runs / "whole", step) for step in (POISONED_STEP - 1, POISONED_STEP))
    assert any(name.startswith("discriminator.layers.") for name in before) and "discriminator.average_logits" in before
    assert_equal(after, before)
    moved = stored(runs / "whole", POISONED_STEP + 1)
    assert all(
        not np.array_equal(moved[name], after[name])
        for name in ("decoder.conv_in.weight", "discriminator.layers.0.weight", "discriminator.average_logits")
    )
    log = (runs / "whole" / "demo_tokenizer" / "log.txt").read_text()
    assert f"step {POISONED_STEP}: the gradient of the discriminator is not finite" in log
    assert f"step {POISONED_STEP} is skipped" in log and "rank 1" in log
    records = read_records(runs / "whole" / "demo_tokenizer" / METRICS_FILE, TokenizerMetrics)
    assert [line.skipped_steps for line in records] == [0, 0, 1, 1, 1, 1]


def test_a_killed_run_goes_on_bit_for_bit(runs: Path):
    shutil.copytree(runs / "killed", runs / "resumed")
    assert run_ranks(2, train, settings_in(runs, "resumed")) == [0, 0]
    assert_equal(stored(runs / "resumed", LAST_STEP), stored(runs / "whole", LAST_STEP))
    assert records_of(runs / "resumed")[POISONED_STEP:] == records_of(runs / "whole")[POISONED_STEP:]
    whole, resumed = (
        json.loads((runs / name / "demo_tokenizer/checkpoints" / step_name(LAST_STEP) / "train_state.json").read_text())
        for name in ("whole", "resumed")
    )
    # Their folders differ, and so their configurations.
    assert whole | {"config_sha256": ""} == resumed | {"config_sha256": ""}
    assert whole["discriminator_updates"] == LAST_STEP - 2
    files = [(runs / f"{name}_weights" / "ae.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.large), 3])
def test_a_killed_run_goes_on_with_another_number_of_ranks(runs: Path, num_ranks: int):
    name = f"on_{num_ranks}"
    shutil.copytree(runs / "killed", runs / name)
    ranks = run_ranks(num_ranks, train, settings_in(runs, name), False, True)
    held: dict[str, np.ndarray] = {}
    for code, step, begun in ranks:
        assert (code, step) == (0, KILLED_STEP - 1)
        held |= {value_name: pieces[0][1] for value_name, pieces in begun.items() if pieces}
    assert_equal(held, stored(runs / "killed", KILLED_STEP - 1))
    assert_rounding(stored(runs / name, LAST_STEP), stored(runs / "whole", LAST_STEP), 1e-4)
    whole = records_of(runs / "whole")[KILLED_STEP - 1 :]
    np.testing.assert_allclose(records_of(runs / name)[KILLED_STEP - 1 :], whole, rtol=1e-5)
