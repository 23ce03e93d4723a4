"""Tokenizer training as a whole on a few small pictures: it learns, it is reproducible, it leaves usable weights."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR
from bitdance_scale.checkpoint.step_names import step_name
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import VisionSection
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.demo.shards import write_shards
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.pixels import psnr_db
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, read_records
from bitdance_scale.train.tokenizer import TokenizerJob, _held_out_images, run_tokenizer
from bitdance_scale.train.tokenizer_evaluation import evaluate
from bitdance_scale.train.tokenizer_networks import Outputs, TokenizerNetworks
from bitdance_scale.train.tokenizer_objective import Crops, edge_loss
from bitdance_scale.train.tokenizer_records import TokenizerEvaluation, TokenizerMetrics
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.tokenizer import VisionTokenizer
from tests.small_tokenizer import SIZES

DEMO = CONFIGS / "demo_tokenizer.toml"
Losses = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer_shards")
    write_shards(folder / "train", num_images=24, per_shard=24, seed=0)
    write_shards(folder / "held_out", num_images=8, per_shard=8, seed=1)
    return folder


def small_config(shards: Path, out: Path, *overrides: str) -> TokenizerConfig:
    settings = [
        f"run.root={out}", f"run.output={out / 'weights'}", f'data.shards=["{shards / "train"}"]',
        f'evaluate.shards=["{shards / "held_out"}"]', f"data.index_dir={out / 'index'}", "run.dtype=float32",
        "run.steps=12",
        "observe.log_every_steps=1", *SIZES,
        "data.sizes_px=[[16, 16], [32, 16]]",
        "data.images_px=2048", "optim.warmup_steps=2", "evaluate.sizes_px=[[16, 16]]", "evaluate.num_images=8",
        "observe.wandb_mode=disabled", *overrides,
    ]  # fmt: skip
    return load_config(DEMO, settings, TokenizerConfig)


def records(out: Path) -> list[TokenizerMetrics]:
    return read_records(out / "demo_tokenizer" / METRICS_FILE, TokenizerMetrics)


def test_the_index_of_held_out_images_lies_in_that_of_the_run(shards: Path, tmp_path: Path):
    # Where the shards are may be read-only.
    _held_out_images(small_config(shards, tmp_path))
    assert len(list((tmp_path / "index" / "held_out").glob("index_*.json"))) == 1
    assert not (shards / "held_out" / ".bitdance_index").exists()


def test_a_run_learns_and_leaves_weights_that_the_tokenizer_loads(shards: Path, tmp_path: Path):
    assert run_tokenizer(small_config(shards, tmp_path, "run.steps=40")) == 0
    losses = [record.l1 for record in records(tmp_path)]
    assert len(losses) == 40
    # Learning to paint the mean colour alone takes off more than a quarter; without learning they scatter by a tenth.
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    section = VisionSection(
        weights=str(tmp_path / "weights" / "ae.safetensors"),
        num_bits=small_config(shards, tmp_path).autoencoder.num_bits,
        channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
    )
    tokenizer = VisionTokenizer(section, "cpu")
    image = torch.full((16, 24, 3), 200, dtype=torch.uint8)
    (bits,) = tokenizer.encode([image])
    assert tokenizer.decode(bits, (8, 12)).shape == (16, 24, 3)
    evaluations = read_records(tmp_path / "demo_tokenizer" / EVALUATION_FILE, TokenizerEvaluation)
    assert [evaluation.step for evaluation in evaluations] == [0, 40]
    assert evaluations[1].psnr_db["16x16"] > evaluations[0].psnr_db["16x16"] + 3
    assert load_config(tmp_path / "demo_tokenizer" / "config.toml", schema=TokenizerConfig).run.steps == 40


def test_equal_seeds_give_equal_weights(shards: Path, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_tokenizer(small_config(shards, tmp_path / name, "run.steps=2", f"run.seed={seed}"))
    first, same, other = (load_file(tmp_path / name / "weights" / "ae.safetensors") for name in "abc")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_held_out_shards_must_be_held_out(shards: Path, tmp_path: Path):
    (tmp_path / "linked").symlink_to(shards / "train")
    for folder in (shards / "train", tmp_path / "linked"):
        with pytest.raises(ConfigError, match=rf"evaluate\.shards: {folder}/00000\.tar is trained on as well"):
            run_tokenizer(small_config(shards, tmp_path, f'evaluate.shards=["{folder}"]'))


def test_the_index_of_held_out_shards_is_in_the_folder_of_the_run(shards: Path, tmp_path: Path):
    """The shards may be in a place that is read only, or on S3."""
    folder = shutil.copytree(shards / "held_out", tmp_path / "held_out", ignore=shutil.ignore_patterns(".*"))
    _held_out_images(small_config(shards, tmp_path, f'evaluate.shards=["{folder}"]'))
    assert (tmp_path / "index" / "held_out").is_dir() and not (folder / ".bitdance_index").exists()


def test_missing_shards_are_named(shards: Path, tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        run_tokenizer(small_config(shards, tmp_path, 'data.shards=["nowhere"]'))


def stored_tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    stored = StoredTensors(out / "demo_tokenizer" / "checkpoints" / step_name(step) / TENSORS_DIR)
    return {name: stored.read_rows(name, 0, stored.index.spec(name).shape[0]) for name in stored.index.tensors}


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def averaged_once(average: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 0.7 * average[name] + 0.3 * weights[name] for name in average}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # float32; the run adds up in one operation.
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


EVERY_STEP = (
    "run.steps=4", "checkpoint.every_steps=1", "checkpoint.keep=9", "checkpoint.in_background=false",
    "optim.schedule=constant", "evaluate.every_steps=1", "evaluate.num_images=2",
)  # fmt: skip
AVERAGED = (*EVERY_STEP, "optim.average_decay=0.7", "evaluate.weights=averaged")


@pytest.fixture(scope="module")
def averaged_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, the second of which changes nothing."""
    out = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        compute = TokenizerNetworks._losses

        def compute_with_a_fault(networks: TokenizerNetworks, crops: Crops, outputs: Outputs, step: int) -> Losses:
            losses = compute(networks, crops, outputs, step)
            return losses | {"total": losses["total"] * (math.nan if step == 1 else 1)}

        patch.setattr(TokenizerNetworks, "_losses", compute_with_a_fault)
        assert run_tokenizer(small_config(shards, out, *AVERAGED)) == 0
    return out


def test_averages_are_those_of_the_weights_of_every_step(shards: Path, averaged_run: Path):
    torch.manual_seed(0)
    section = small_config(shards, averaged_run).autoencoder
    average = dict(Autoencoder(**dataclasses.asdict(section)).named_parameters())
    weights = [part(stored_tensors(averaged_run, step), "model.") for step in (1, 2, 3, 4)]
    name = "encoder.conv_in.weight"
    assert torch.equal(weights[1][name], weights[0][name]) and not torch.equal(weights[2][name], weights[1][name])
    for step in (1, 3, 4):
        average = averaged_once(average, weights[step - 1])
        assert_close(part(stored_tensors(averaged_run, step), "optimizer.average."), average)
    # Published unless told otherwise, with what it reconstructs.
    published = load_file(averaged_run / "weights" / "ae.safetensors")
    assert_close({name: published[name] for name in average}, average)
    autoencoder, psnrs = Autoencoder(**dataclasses.asdict(section)), []
    (images,) = _held_out_images(small_config(shards, averaged_run, *AVERAGED)).values()
    for values in (published, weights[-1]):
        autoencoder.load_state_dict(values)
        psnrs.append(evaluate(autoencoder, images, 2, torch.device("cpu")).psnr_db)
    evaluations = read_records(averaged_run / "demo_tokenizer" / EVALUATION_FILE, TokenizerEvaluation)
    assert evaluations[-1].psnr_db["16x16"] == pytest.approx(psnrs[0], abs=1e-6)
    assert abs(psnrs[1] - psnrs[0]) > 0.01


def test_averages_change_nothing_that_is_trained_and_resume_exactly(shards: Path, tmp_path: Path):
    for name, settings in (("plain", EVERY_STEP), ("whole", AVERAGED), ("resumed", AVERAGED)):
        for steps in (1, 3) if name == "resumed" else (3,):
            assert run_tokenizer(small_config(shards, tmp_path / name, *settings, f"run.steps={steps}")) == 0
    plain, whole, resumed = (stored_tensors(tmp_path / name, 3) for name in ("plain", "whole", "resumed"))
    assert plain.keys() < whole.keys() == resumed.keys()
    assert all(torch.equal(plain[name], whole[name]) for name in plain)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    # A run that begins to average begins with its weights. When it is complete, it writes others where none are.
    settings = (*AVERAGED, "run.steps=4")
    for changes in ((), ("run.output_weights=trained", f"run.output={tmp_path / 'again'}")):
        assert run_tokenizer(small_config(shards, tmp_path / "plain", *settings, *changes)) == 0
    last = stored_tensors(tmp_path / "plain", 4)
    begun = averaged_once(part(plain, "model."), part(last, "model."))
    assert_close(part(last, "optimizer.average."), begun)
    for folder, prefix in (("plain/weights", "optimizer.average."), ("again", "model.")):
        published = load_file(tmp_path / folder / "ae.safetensors")
        assert all(torch.equal(published[name], value) for name, value in part(last, prefix).items())


def test_a_longer_run_that_is_killed_before_its_end_leaves_its_own_weights(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = (*EVERY_STEP, "evaluate.every_steps=100")
    assert run_tokenizer(small_config(shards, tmp_path, *settings, "run.steps=1")) == 0
    longer = small_config(shards, tmp_path, *settings, "run.steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerJob, "finish", fail)
        with pytest.raises(RuntimeError, match="cannot go on"):
            run_tokenizer(longer)
    file, last = tmp_path / "weights" / "ae.safetensors", part(stored_tensors(tmp_path, 2), "model.")
    assert not torch.equal(load_file(file)["encoder.conv_in.weight"], last["encoder.conv_in.weight"])
    assert run_tokenizer(longer) == 0
    published = load_file(file)
    assert all(torch.equal(published[name], value) for name, value in last.items())
    # Once they are there nothing is written, unless one of the two files is missing or of other settings.
    written_ns = file.stat().st_mtime_ns
    assert run_tokenizer(longer) == 0 and file.stat().st_mtime_ns == written_ns
    (file.parent / "ae_config.json").unlink()
    assert run_tokenizer(longer) == 0 and (file.parent / "ae_config.json").is_file()
    assert run_tokenizer(small_config(shards, tmp_path, *settings, "run.steps=2", "run.output_dtype=bfloat16")) == 0
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    evaluations = read_records(tmp_path / "demo_tokenizer" / EVALUATION_FILE, TokenizerEvaluation)
    assert [evaluation.step for evaluation in evaluations] == [0, 1, 2]


def fail(*_: object) -> None:
    raise RuntimeError("cannot go on")


def test_an_error_in_the_last_measurement_is_no_complete_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = (*AVERAGED, "run.steps=1", "evaluate.every_steps=100", "evaluate.weights=trained")
    config = small_config(shards, tmp_path, *settings)
    calls: list[int] = []

    def evaluate_or_fail(*arguments: object) -> object:
        calls.append(1)
        # Before the first step and after the last with the trained weights, and then with those that are written.
        return evaluate(*arguments) if len(calls) < 3 else fail()

    monkeypatch.setattr("bitdance_scale.train.tokenizer.evaluate", evaluate_or_fail)
    for _ in ("at the end of the run", "in a run that is complete"):
        with pytest.raises(RuntimeError, match="cannot go on"):
            run_tokenizer(config)
    assert not (tmp_path / "weights").exists()


def test_psnr_by_hand():
    images = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    decoded = images.copy()
    decoded[1] = 51
    # An error of 51 everywhere is a fifth of the range: 20 log10(5) dB.
    assert psnr_db(decoded, images).tolist() == pytest.approx([100.0, 20 * math.log10(5)])


def test_another_loss_is_no_spike_of_the_old_one(shards: Path, tmp_path: Path):
    guarded = ("optim.spike_window=8", "optim.spike_action=skip", "optim.max_skipped_steps=1")
    assert run_tokenizer(small_config(shards, tmp_path, *guarded, "run.steps=8")) == 0
    changed = ("run.steps=10", "reconstruction.l1_weight=1000.0")
    assert run_tokenizer(small_config(shards, tmp_path, *guarded, *changed)) == 0
    assert records(tmp_path)[-1].spikes == 0


def test_edge_loss_by_hand():
    pixels = torch.zeros(1, 3, 4, 4)
    decoded = pixels.clone()
    decoded[..., 2:] = 1.0
    # One of three horizontal differences is off by 1, no vertical one: (1/3 + 0) / 2.
    assert edge_loss(decoded, pixels).item() == pytest.approx(1 / 6)
    assert edge_loss(pixels + 0.5, pixels).item() == 0


def test_evaluation_counts_bits_and_hides_nothing_behind_batches(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    autoencoder = Autoencoder(num_bits=8, channels=32, channel_mult=(1, 1), num_res_blocks=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    whole = evaluate(autoencoder, images, 1, torch.device("cpu"))
    monkeypatch.setattr("bitdance_scale.train.tokenizer_evaluation.BATCH_PX", 2 * 16 * 16)
    parts = evaluate(autoencoder, images, 1, torch.device("cpu"))
    assert whole.decoded.shape == images.shape and whole.bit_balance.shape == (8,)
    np.testing.assert_array_equal(whole.bit_balance, parts.bit_balance)
    # A byte at a rounding boundary may differ between batch sizes.
    assert whole.psnr_db == pytest.approx(parts.psnr_db, abs=0.01)
    assert 0 < whole.code_share <= 1 and 0 <= whole.code_entropy_bits <= 8
