"""Whole runs with bad steps: what is skipped, what is written down, and that a resumed run decides the same."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from bitdance_scale.observe.faults import FAULTS_FILE, Fault
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics, read_records
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks

NUM_STEPS, SAVED_STEP = 15, 12
POISONED_STEP = 2
# Few deviations over a short window: the small runs have some spikes, and not only spikes.
SPIKES = ["optim.spike_window=8", "optim.spike_action=skip"]


def _train(rank: int, root: str, overrides: list[str]) -> tuple[int, int, int]:
    """(optimiser steps that AdamW counts, steps, spikes); rank 1 gets a NaN in the noise of step `POISONED_STEP`."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.process import StopRequest
    from bitdance_scale.train.run import train
    from bitdance_scale.train.text_to_image import TextToImageJob

    config = load_config("demo", [*overrides, f"run.root='{root}'"])
    start_process_group(timeout_s=60)
    prepare = TextToImageJob._prepare

    def prepare_with_nan(job: TextToImageJob, packs, step: int) -> list:
        batch = prepare(job, packs, step)
        if rank == 1 and step + 1 == POISONED_STEP:
            batch[-1] = dataclasses.replace(batch[-1], noise=batch[-1].noise * math.nan)
        return batch

    TextToImageJob._prepare = prepare_with_nan
    job = TextToImageJob(config, make_topology(config.parallel), Path(root) / config.run.name)
    with StopRequest() as stop:
        assert train(job, stop)
    return job._engine.optimizer_step(), job.step, job.guards.num_spikes


def _drop_checkpoints_after(folder: Path, step: int) -> None:
    for path in folder.iterdir():
        number = "".join(filter(str.isdigit, path.name))
        if path.is_dir() and int(number) > step:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()


def _masters(folder: Path) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint."""
    newest = max(path for path in folder.iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in (newest / "tensors").iterdir() if path.suffix != ".json"}


def test_a_run_names_its_bad_steps_and_resumes_with_what_it_remembers(tmp_path):
    overrides = small_demo(tmp_path, num_steps=NUM_STEPS, save_every=SAVED_STEP)
    # A falling loss is no spike, and one above it now and then is.
    overrides += ["optim.lr=2e-3", "head.diff_batch_mul=1", "head.time_shift=1"]
    overrides += ["checkpoint.keep=5", "optim.spike_deviations=3.0", *SPIKES]
    ranks = run_ranks(2, _train, str(tmp_path / "a"), overrides)
    run = tmp_path / "a" / "demo"
    faults = read_records(run / FAULTS_FILE, Fault)
    bad, spikes = faults[0], [fault for fault in faults if fault.kind == "spike"]
    assert (bad.kind, bad.cause, bad.rank, bad.step) == ("non_finite", "data", 1, POISONED_STEP)
    assert bad.samples and all(Path(sample["shard"]).is_file() and sample["name"] for sample in bad.samples)
    refused = {fault.step for fault in spikes}
    assert min(refused) > 9, "the window of 8 holds the sound steps 1, 3 .. 9"
    assert min(refused) <= SAVED_STEP and not refused >= {*range(SAVED_STEP + 1, NUM_STEPS + 1)}
    metrics = read_metrics(run / METRICS_FILE)
    assert metrics[-1].skipped_steps == 1 and metrics[-1].spikes == len(refused)
    assert ranks == [(NUM_STEPS - 1 - len(refused), NUM_STEPS, len(refused))] * 2

    shutil.copytree(run, tmp_path / "b" / "demo")
    _drop_checkpoints_after(tmp_path / "b" / "demo" / "checkpoints", SAVED_STEP)
    assert run_ranks(2, _train, str(tmp_path / "b"), overrides) == ranks
    assert _masters(tmp_path / "b" / "demo" / "checkpoints") == _masters(run / "checkpoints")
    resumed = read_metrics(tmp_path / "b" / "demo" / METRICS_FILE)
    assert [(line.loss, line.grad_norm, line.spikes) for line in resumed] == [
        (line.loss, line.grad_norm, line.spikes) for line in metrics
    ]


def test_every_second_step_not_finite_ends_the_run(tmp_path):
    overrides = small_demo(tmp_path, num_steps=NUM_STEPS, save_every=NUM_STEPS)
    with pytest.raises(AssertionError, match=r"3 of the last 5 steps were skipped"):
        run_ranks(
            1, _train_with_every_second_step_bad, str(tmp_path),
            [*overrides, "optim.skipped_window=10", "optim.max_skipped_share=0.2"],
        )  # fmt: skip


def _train_with_every_second_step_bad(rank: int, root: str, overrides: list[str]) -> None:
    from bitdance_scale.train.text_to_image import TextToImageJob

    prepare = TextToImageJob._prepare

    def prepare_with_nan(job: TextToImageJob, packs, step: int) -> list:
        batch = prepare(job, packs, step)
        return batch if step % 2 else [dataclasses.replace(item, noise=item.noise * math.nan) for item in batch]

    TextToImageJob._prepare = prepare_with_nan
    _train(rank, root, overrides)


def _tokenizer(rank: int, settings: list[str], has_fault: bool) -> int:
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.shipped import CONFIGS
    from bitdance_scale.config.tokenizer_schema import TokenizerConfig
    from bitdance_scale.train import tokenizer
    from bitdance_scale.train.tokenizer_objective import TokenizerObjective

    compute, calls = TokenizerObjective.losses, []

    def faulty(objective: TokenizerObjective, *arguments) -> dict[str, torch.Tensor]:
        calls.append(1)
        losses = compute(objective, *arguments)
        is_now = has_fault and rank == 1 and len(calls) == POISONED_STEP
        return {name: value * math.nan for name, value in losses.items()} if is_now else losses

    TokenizerObjective.losses = faulty
    return tokenizer.run_tokenizer(load_config(CONFIGS / "demo_tokenizer.toml", settings, TokenizerConfig))


def test_the_tokenizer_keeps_the_same_rules(tmp_path):
    from bitdance_scale.demo.shards import write_shards

    write_shards(tmp_path / "train", num_images=16, per_shard=8, seed=0)
    write_shards(tmp_path / "held_out", num_images=4, per_shard=4, seed=1)
    settings = [
        f'data.shards=["{tmp_path / "train"}"]', f'evaluate.shards=["{tmp_path / "held_out"}"]',
        "run.dtype=float32", f"run.steps={NUM_STEPS}", "observe.log_every_steps=1", "autoencoder.channel_mult=[1, 1]",
        "data.sizes_px=[[16, 16]]", "data.images_px=2048", "optim.warmup_steps=0",
        "observe.wandb_mode=disabled", "evaluate.sizes_px=[[16, 16]]", "checkpoint.every_steps=12",
        "checkpoint.keep=5", "optim.spike_deviations=1.0", *SPIKES,
    ]  # fmt: skip
    first = [*settings, f"run.root={tmp_path / 'a'}", f"run.output={tmp_path / 'weights_a'}"]
    assert run_ranks(2, _tokenizer, first, True) == [0, 0]
    run = tmp_path / "a" / "demo_tokenizer"
    faults = read_records(run / FAULTS_FILE, Fault)
    assert (faults[0].cause, faults[0].rank, faults[0].step) == ("machine", 1, POISONED_STEP)
    assert len(faults[0].samples) == 4 and faults[0].samples[0]["shard"].endswith(".tar")
    assert {fault.kind for fault in faults[1:]} == {"spike"}
    assert any(fault.step <= 12 for fault in faults[1:]) and all(fault.step < NUM_STEPS for fault in faults[1:])
    assert f"step {POISONED_STEP} is skipped, its gradient is not finite: rank 1" in (run / "log.txt").read_text()
    state = json.loads(next((run / "checkpoints").glob("*12/train_state.json")).read_text())
    assert state["skipped_steps"] == 1 and len(state["guards"]["loss"]) == 8

    shutil.copytree(run, tmp_path / "b" / "demo_tokenizer")
    _drop_checkpoints_after(tmp_path / "b" / "demo_tokenizer" / "checkpoints", 12)
    second = [*settings, f"run.root={tmp_path / 'b'}", f"run.output={tmp_path / 'weights_b'}"]
    assert run_ranks(2, _tokenizer, second, False) == [0, 0]
    assert _masters(tmp_path / "b" / "demo_tokenizer" / "checkpoints") == _masters(run / "checkpoints")
