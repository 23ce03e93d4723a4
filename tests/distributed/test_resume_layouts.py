"""A run that is stopped and resumed under another layout, again and again, goes on as if nothing had happened.

One of the layouts has another optimiser engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks

# (ranks, settings of `parallel`, last step): replicas and ranks change at every stop, and the engine twice.
LEGS = [
    (2, {"tensor": 1, "pipeline": 1, "zero_stage": 1}, 2),
    (4, {"tensor": 2, "pipeline": 1, "optimizer": "megatron"}, 4),
    (2, {"tensor": 1, "pipeline": 2, "zero_stage": 1}, 6),
    (3, {"tensor": 1, "pipeline": 1, "zero_stage": 3}, 8),
    (1, {"tensor": 1, "pipeline": 1, "zero_stage": 2}, 10),
]
NUM_STEPS = LEGS[-1][-1]
# Steps large enough to be seen in the loss; epsilon raised so that Adam does not turn rounding of a gradient near zero
# into a step of full size (tests/distributed/toy.py).
OPTIMISER = ["optim.lr=1e-3", "optim.warmup_steps=0", "optim.eps=1e-4"]
# Layouts sum in another order: one unit in the last place of float32 is 1.2e-7, the worst loss seen differs by 1.1e-7,
# and ten steps of training may carry some units on. A resume that loses the moments is off by 1e-2 from its second step
# on, one that loses the step counter by 2e-2.
TOLERANCE = 2e-6
Samples = dict[int, list[int]]


def _train(
    rank: int, root: str, overrides: list[str], parallel: dict[str, object], last_step: int
) -> tuple[int, Samples]:
    """Trains until one rank is asked to stop; (data-parallel rank, step -> keys of its samples)."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.process import StopRequest
    from bitdance_scale.train.run import train
    from bitdance_scale.train.text_to_image import TextToImageJob

    layout = [f"parallel.{name}={value}" for name, value in parallel.items()]
    config = load_config("demo", [*overrides, *layout, f"run.root='{root}'"])
    start_process_group(timeout_s=60)
    topology = make_topology(config.parallel)
    job = TextToImageJob(config, topology, Path(root) / config.run.name)
    first_step = job.step
    prepared: Samples = {}
    prepare = job._prepare

    def record(packs, step):
        prepared[step + 1] = [key for pack in packs for key in pack.sample_keys.tolist()]
        return prepare(packs, step)

    job._prepare = record

    class RequestOnOneRank(StopRequest):
        @property
        def is_requested(self) -> bool:
            # Asked after every step.
            return job.step == last_step and rank == dist.get_world_size() - 1

    with RequestOnOneRank() as stop:
        train(job, stop)
    # One step more is prepared than trained; the run that goes on trains it.
    samples = {step: keys for step, keys in prepared.items() if step <= last_step}
    assert sorted(samples) == list(range(first_step + 1, last_step + 1))
    assert job.step == last_step
    return topology.data_rank, samples


def _samples_of(records: list[tuple[int, Samples]]) -> Samples:
    """Step -> keys over all replicas, sorted; each replica counts once."""
    replicas = dict(records)
    steps = set().union(*replicas.values())
    return {step: sorted(key for samples in replicas.values() for key in samples.get(step, [])) for step in steps}


def _final_state(root: Path) -> dict[str, object]:
    return json.loads((root / f"demo/checkpoints/step_{NUM_STEPS:08d}/train_state.json").read_text())


def test_a_run_continues_under_other_layouts(tmp_path):
    overrides = [*small_demo(tmp_path, num_steps=NUM_STEPS, save_every=NUM_STEPS), *OPTIMISER]
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    num_ranks, parallel, _ = LEGS[0]
    expected = _samples_of(run_ranks(num_ranks, _train, str(whole), overrides, parallel, NUM_STEPS))
    found: Samples = {}
    for num_ranks, parallel, last_step in LEGS:
        found |= _samples_of(run_ranks(num_ranks, _train, str(legs), overrides, parallel, last_step))
    assert found == expected and sorted(found) == list(range(1, NUM_STEPS + 1))

    reference = read_metrics(whole / "demo" / METRICS_FILE)
    metrics = read_metrics(legs / "demo" / METRICS_FILE)
    assert [point.step for point in metrics] == [point.step for point in reference] == list(range(1, NUM_STEPS + 1))
    for point, other in zip(metrics, reference, strict=True):
        for field in ("images", "tokens", "images_by_resolution", "skipped_samples", "skipped_steps", "lr"):
            assert getattr(point, field) == getattr(other, field), (point.step, field)
        assert point.loss == pytest.approx(other.loss, rel=TOLERANCE), point.step
    # Training has moved the loss by far more than the tolerance: not following it would be noticed.
    assert abs(reference[0].loss - reference[-1].loss) > 1e4 * TOLERANCE * reference[0].loss

    states = [_final_state(root) for root in (whole, legs)]
    for state in states:
        # How many ranks the next step is dealt to is the layout's, and without a meaning at the border of a step.
        assert state["loader"].pop("num_data_ranks") in (1, 2)
        assert state["loader"]["pack"] == 0
        # The digest of config.toml, which holds the layout.
        state.pop("config_sha256")
    windows = [{name: state["guards"].pop(name) for name in ("loss", "grad_norm")} for state in states]
    for name, values in windows[0].items():
        # Sums over other ranks differ in their last bits.
        assert values == pytest.approx(windows[1][name], rel=TOLERANCE)
    assert states[0] == states[1]
