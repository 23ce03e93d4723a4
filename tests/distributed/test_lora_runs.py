"""Runs with adapters: they start from another run, change nothing of it, stop, go on, and draw."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR, read_state
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.tensor_index import read_index
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks

NUM_STEPS = 4
LORA = ["lora.rank=2", "lora.train_projector=true", "lora.dropout=0.1", "optim.average_decay=0.5", "run.stage=sft"]
TRAINED = ("projector.", ".adapter.")


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("material")
    return [*small_demo(folder, num_steps=NUM_STEPS, save_every=2), "sample.prompts=['a red circle']"]


def _train(rank: int, root: str, overrides: list[str], num_steps: int = NUM_STEPS) -> dict[str, object]:
    """Trains in this process until a step; what it held before and after, and what it draws at the end."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.rules import check
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.process import StopRequest
    from bitdance_scale.train.run import train
    from bitdance_scale.train.text_to_image import TextToImageJob

    config = load_config("demo", [*overrides, f"run.root='{root}'"])
    start_process_group(timeout_s=60)
    topology = make_topology(config.parallel)
    check(config, topology.world_size)
    job = TextToImageJob(config, topology, Path(root) / config.run.name)
    record: dict[str, object] = {"start_step": job.step, "before": _digests(job._engine.model_values())}

    class Stop(StopRequest):
        @property
        def is_requested(self) -> bool:
            return job.step == num_steps < config.run.steps or super().is_requested

    with Stop() as stop:
        is_complete = train(job, stop)
    assert is_complete == (num_steps == config.run.steps)
    record |= {"after": _digests(job._engine.model_values()), "optimizer": _digests(job._engine.optimizer_values())}
    with job._engine.weights_of("averaged" if config.optim.average_decay else "trained"):
        record["codes"] = job._draw_samples()
    return record


def _digests(values) -> dict[str, str]:
    digests = {}
    for name, value in values.items():
        digest = hashlib.sha256()
        for piece in value.pieces:
            digest.update(piece.tensor.detach().contiguous().view(-1).numpy().tobytes())
        digests[name] = digest.hexdigest()
    return digests


@pytest.fixture(scope="module")
def base(material, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("base")
    run_ranks(1, _train, str(root), material)
    return root / "demo"


@pytest.fixture(scope="module")
def lora(material, base) -> list[str]:
    return [*material, *LORA, f"run.start_from='{base}'", "run.start_from_any=true"]


@pytest.fixture(scope="module")
def uninterrupted(lora, tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    return root, run_ranks(2, _train, str(root), lora)


def test_frozen_weights_stay_and_are_not_saved(base, uninterrupted):
    root, records = uninterrupted
    for record in records:
        changed = {name for name in record["before"] if record["before"][name] != record["after"][name]}
        assert changed == {name for name in record["before"] if any(part in name for part in TRAINED)}
        assert any(name.startswith("embedding") for name in record["before"])
    checkpoint = find_checkpoint(root / "demo")
    stored = read_index(checkpoint / TENSORS_DIR).tensors
    kinds = {name.removeprefix("optimizer.").partition(".")[0] for name in stored}
    assert kinds == {"model", "master", "exp_avg", "exp_avg_sq", "average"}
    assert all(any(part in name for part in TRAINED) for name in stored)
    assert read_state(checkpoint).base_digest


def test_a_stopped_run_goes_on_as_if_it_had_not(lora, uninterrupted, tmp_path):
    run_ranks(2, _train, str(tmp_path), lora, 2)
    resumed = run_ranks(2, _train, str(tmp_path), lora)
    for found, expected in zip(resumed, uninterrupted[1], strict=True):
        assert found["start_step"] == 2
        assert found["after"] == expected["after"] and found["optimizer"] == expected["optimizer"]


def test_a_run_goes_on_under_another_layout(lora, uninterrupted, tmp_path):
    """Its checkpoint is read by two tensor-parallel ranks under Megatron-core's optimiser."""
    run_ranks(2, _train, str(tmp_path), lora, 2)
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.optimizer=megatron"]
    resumed = run_ranks(2, _train, str(tmp_path), [*lora, *layout])
    assert resumed[0]["start_step"] == 2
    first, second = (resumed[rank]["codes"] for rank in (0, 1))
    assert len(first) == 1 and not second


def test_a_drawing_of_its_checkpoint_is_the_run_s_own(lora, uninterrupted):
    root, records = uninterrupted
    drawn = run_ranks(1, _draw, str(root), lora)[0]
    assert all(np.array_equal(*pair) for pair in zip(drawn, records[0]["codes"], strict=True))


def _draw(rank: int, root: str, overrides: list[str]) -> list[np.ndarray]:
    from bitdance_scale.checkpoint.stored_config import stored_config
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.sampling import draw_samples
    from bitdance_scale.train.still_run import load_still_run

    checkpoint = find_checkpoint(Path(root) / "demo")
    config = stored_config(checkpoint, ["parallel.zero_stage=1"])
    start_process_group(timeout_s=60)
    topology = make_topology(config.parallel)
    run = load_still_run(config, checkpoint, "averaged", topology)
    return draw_samples(run.model, config, run.condition, topology)


def test_quantised_weights_are_the_same_after_a_stop_and_in_a_drawing(lora, tmp_path):
    quantised = [*lora, "lora.base_bits=4"]
    whole = run_ranks(1, _train, str(tmp_path / "whole"), quantised)[0]
    run_ranks(1, _train, str(tmp_path / "stopped"), quantised, 2)
    resumed = run_ranks(1, _train, str(tmp_path / "stopped"), quantised)[0]
    assert resumed["start_step"] == 2
    assert resumed["after"] == whole["after"] and resumed["optimizer"] == whole["optimizer"]
    drawn = run_ranks(1, _draw, str(tmp_path / "whole"), quantised)[0]
    assert all(np.array_equal(*pair) for pair in zip(drawn, whole["codes"], strict=True))


def test_adapters_go_on_in_another_run(lora, uninterrupted, tmp_path):
    goes_on = [*lora, f"lora.start_from='{uninterrupted[0] / 'demo'}'", "run.steps=1"]
    record = run_ranks(1, _train, str(tmp_path), goes_on, 1)[0]
    assert record["start_step"] == 0
    assert record["before"] == uninterrupted[1][0]["after"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rank=3", r"lora.rank = 3: the adapters of .* have 2, and matrices of another rank cannot go on"),
        ("lora.alpha=2.0", r"lora.alpha = 2.0: the adapters of .* have 16.0"),
        ("lora.targets=['q_proj']", r"lora.targets = \[.q_proj.\]: the adapters of "),
        ("run.start_weights=averaged", r"has no averaged weights"),
    ],
)
def test_other_adapters_are_refused(lora, uninterrupted, tmp_path, change, message):
    goes_on = [*lora, f"lora.start_from='{uninterrupted[0] / 'demo'}'", change]
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, _train, str(tmp_path), goes_on, 1)


def test_a_run_with_adapters_is_no_start_of_others(lora, uninterrupted, tmp_path):
    wrong = [item for item in lora if not item.startswith("run.start_from=")]
    with pytest.raises(AssertionError, match="a run with adapters, whose checkpoints do not have the frozen weights"):
        run_ranks(1, _train, str(tmp_path), [*wrong, f"run.start_from='{uninterrupted[0] / 'demo'}'"], 1)


def test_adapters_beside_other_weights_are_refused(material, lora, tmp_path):
    run_ranks(1, _train, str(tmp_path), lora, 2)
    run_ranks(1, _train, str(tmp_path), [*material, "run.name=other", "run.seed=1"])
    with pytest.raises(AssertionError, match="trained beside other weights"):
        run_ranks(1, _train, str(tmp_path), [*lora, f"run.start_from='{tmp_path / 'other'}'"])


def test_targets_that_match_nothing(lora, tmp_path):
    with pytest.raises(AssertionError, match=r"lora.targets: 'q_prj': no linear .* nearest are q_proj"):
        run_ranks(1, _train, str(tmp_path), [*lora, "lora.targets=['q_prj', 'v_proj']"])
