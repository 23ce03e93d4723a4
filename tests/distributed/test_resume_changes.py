"""What a run may change when it goes on, what it may not, and that watching it changes no number; on real ranks."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitdance_scale.observe.metrics import METRICS_FILE, StepMetrics, read_metrics
from bitdance_scale.observe.profiler import PROFILE_DIR, trace_path
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks

NUM_RANKS = 2
NUM_STEPS = 2
TIMES = (
    "step_s",
    "data_wait_s",
    "tokens_per_s",
    "images_per_s",
    "memory_bytes",
    "steps_ready",
    "slowest_rank",
    "slowest_excess",
)


def _train(rank: int, root: str, overrides: list[str]) -> str:
    """Trains to the end on this rank; returns the refusal."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.errors import BitDanceError
    from bitdance_scale.train.text_to_image import run_text_to_image

    try:
        run_text_to_image(load_config("demo", [*overrides, f"run.root='{root}'"]))
    except BitDanceError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def numbers(run: Path) -> list[StepMetrics]:
    return [dataclasses.replace(point, **dict.fromkeys(TIMES, 0)) for point in read_metrics(run / METRICS_FILE)]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("material")
    return folder, small_demo(folder, num_steps=NUM_STEPS, save_every=NUM_STEPS)


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert run_ranks(NUM_RANKS, _train, str(root), material[1]) == [""] * NUM_RANKS
    return root


def test_traces_and_tensorboard_change_no_number(material, trained, tmp_path):
    watched = [*material[1], "observe.profile_steps=[2]", "observe.profile_ranks=[0, 1]", "observe.tensorboard=true"]
    assert run_ranks(NUM_RANKS, _train, str(tmp_path), watched) == [""] * NUM_RANKS
    run = tmp_path / "demo"
    assert numbers(run) == numbers(trained / "demo")
    assert sorted((run / PROFILE_DIR).iterdir()) == [trace_path(run, 2, rank) for rank in range(NUM_RANKS)]
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_another_run_is_refused_on_all_ranks_and_leaves_the_folder_as_it_is(material, trained):
    folder, overrides = material
    negated = folder / "negated.safetensors"
    weights = load_file(folder / "ae.safetensors")
    save_file({name: -tensor if "encoder" in name else tensor for name, tensor in weights.items()}, negated)
    config = (trained / "demo" / "config.toml").read_bytes()
    for change, message in [
        (f"vision.weights='{negated}'", "CheckpointError: .*trained with another vision tokenizer"),
        ("model.norm_eps=1e-5", r"ConfigError: model.norm_eps = 1e-05: .* was trained with 1e-06; set model.norm_eps="),
        (
            "run.dtype=bfloat16",
            "ConfigError: run.dtype = 'bfloat16': .* was trained with 'float32'; set run.dtype=float32",
        ),
        ("data.global_batch=20", "CheckpointError: the checkpoint was trained with another data.global_batch"),
        ("run.seed=5", "CheckpointError: the checkpoint was trained with run.seed=1, now it is 5"),
    ]:
        first, second = run_ranks(NUM_RANKS, _train, str(trained), [*overrides, "run.steps=4", change])
        assert first == second
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(first)
        assert (trained / "demo" / "config.toml").read_bytes() == config


# After the test above, which leaves the run as it was.
def test_a_run_goes_on_with_another_rate_and_says_so(material, trained):
    run = trained / "demo"
    before = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    changed = [*material[1], "run.steps=3", "optim.lr=0.5", "data.text_drop=0.0"]
    assert run_ranks(NUM_RANKS, _train, str(trained), changed) == [""] * NUM_RANKS
    log = (run / "log.txt").read_text(encoding="utf-8")
    told = f"run.steps 2 -> 3, data.text_drop 0.1 -> 0.0, optim.lr {before['optim']['lr']} -> 0.5"
    assert f"resumed with changed settings: {told}\n" in log
    kept = tomllib.loads((run / f"config.step_{NUM_STEPS:06d}.toml").read_text(encoding="utf-8"))
    assert kept == before
    assert tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["optim"]["lr"] == 0.5
    assert [point.step for point in read_metrics(run / METRICS_FILE)] == [1, 2, 3]


def test_another_loss_is_no_spike_of_the_old_one(material, tmp_path):
    """Its steps would all be refused, and two are too many here."""
    guarded = [*material[1], "optim.spike_window=8", "optim.spike_action=skip", "optim.max_skipped_steps=1"]
    assert run_ranks(1, _train, str(tmp_path), [*guarded, "run.steps=8"]) == [""]
    assert run_ranks(1, _train, str(tmp_path), [*guarded, "run.steps=10", "loss.vision_weight=1000"]) == [""]
    metrics = read_metrics(tmp_path / "demo" / METRICS_FILE)
    assert [point.step for point in metrics] == list(range(1, 11)) and metrics[-1].spikes == 0
    assert metrics[-1].loss > 100 * metrics[0].loss
    log = (tmp_path / "demo" / "log.txt").read_text(encoding="utf-8")
    assert "the windows of the rule on spikes begin again" in log
