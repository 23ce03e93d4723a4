"""A run that averages its weights, the averages as a published folder, and a stage that starts from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.export_release import open_checkpoint
from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR
from bitdance_scale.checkpoint.step_names import step_name
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.cli import export_release
from bitdance_scale.model.initial import draw_initial
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks

NUM_STEPS, DECAY = 2, 0.7
FLOAT32 = ("--backbone-dtype", "float32")


def _train(rank: int, settings: list[str]) -> int:
    from bitdance_scale.config.load import load_config
    from bitdance_scale.train.text_to_image import run_text_to_image

    return run_text_to_image(load_config("demo", settings))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs `averaged` under ZeRO-3, and `next`, which starts from its averages on one rank and stands still."""
    root = tmp_path_factory.mktemp("runs")
    settings = [
        *small_demo(root, num_steps=NUM_STEPS, save_every=1), f"run.root='{root}'", "run.dtype=float32",
        "model.num_layers=1", "optim.warmup_steps=0", "optim.decays_vectors=false", "optim.weight_decay=0.1",
        "checkpoint.keep=9", "checkpoint.in_background=false",
    ]  # fmt: skip
    first = ["run.name=averaged", "parallel.zero_stage=3", f"optim.average_decay={DECAY}"]
    start = ["run.name=next", "run.stage=ct", f"run.start_from='{root / 'averaged'}'", "run.start_weights=averaged"]
    # At this rate no float32 weight moves, but for a zero.
    still = [*start, "run.steps=1", "optim.lr=1e-30"]
    for num_ranks, changes in ((2, first), (1, still)):
        assert run_ranks(num_ranks, _train, [*settings, *changes]) == [0] * num_ranks
    return root


def weights(root: Path, run: str, step: int, kind: str) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint."""
    stored = StoredTensors(root / run / "checkpoints" / step_name(step) / TENSORS_DIR)
    return {
        name.removeprefix(f"optimizer.{kind}."): stored.read_rows(name, 0, stored.index.spec(name).shape[0])
        for name in stored.index.tensors
        if name.startswith(f"optimizer.{kind}.")
    }


def plain_average(root: Path) -> dict[str, torch.Tensor]:
    """The average of the weights of all steps, computed here."""
    trained = [weights(root, "averaged", step, "master") for step in range(1, NUM_STEPS + 1)]
    average = {name: draw_initial(name, tuple(value.shape), 1, 0.02, "cpu") for name, value in trained[0].items()}
    for values in trained:
        average = {name: DECAY * average[name] + (1 - DECAY) * values[name] for name in average}
    return average


def published(root: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    assert export_release.main([str(root / "averaged"), str(out), *FLOAT32, *options]) == 0
    return {
        name: value
        for file in ("model", "vision_head", "projector")
        for name, value in load_file(out / f"{file}.safetensors").items()
    }


@pytest.mark.large
def test_an_export_has_the_plain_average_of_all_steps(root, tmp_path, capsys):
    average, trained = plain_average(root), weights(root, "averaged", NUM_STEPS, "master")
    found, others = published(root, tmp_path / "a"), published(root, tmp_path / "t", "--weights", "trained")
    said = capsys.readouterr().out
    assert f"averaged weights, step {NUM_STEPS}" in said and "--weights trained writes the others" in said
    assert f"trained weights, step {NUM_STEPS}" in said
    checkpoint = open_checkpoint(root / "averaged")
    assert found.keys() == others.keys() == {tensor.name for tensor, _ in checkpoint.tensors("averaged")}
    num_different = 0
    for tensor, _ in checkpoint.tensors("averaged"):
        for ours, rows in tensor.rows:
            theirs = slice(rows.published_start, rows.published_start + rows.num_rows)
            mine = slice(rows.start, rows.start + rows.num_rows)
            # float32; the run adds up in one operation.
            torch.testing.assert_close(found[tensor.name][theirs], average[ours][mine], rtol=1e-6, atol=1e-8)
            assert torch.equal(others[tensor.name][theirs], trained[ours][mine])
            num_different += not torch.equal(average[ours], trained[ours])
    assert num_different > 10


@pytest.mark.large
def test_a_stage_starts_from_the_averages(root):
    found, wanted = weights(root, "next", 1, "master"), weights(root, "averaged", NUM_STEPS, "average")
    assert found.keys() == wanted.keys()
    for name, average in wanted.items():
        # Only what is exactly zero moves, by the rate.
        torch.testing.assert_close(found[name], average, rtol=0, atol=1e-29, msg=name)
