"""Bad numbers on real ranks: no rank steps, the rank and the samples are named, and a refused step changes nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitdance_scale.observe.faults import FAULTS_FILE, Fault
from bitdance_scale.observe.metrics import read_records
from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config, toy_packs

POISONED_MICRO = 1
MEGATRON = {"optimizer": "megatron"}


def _num_micro(config) -> int:
    # The interleaved schedule runs groups of as many micro-batches as pipeline ranks.
    return 2 if config.parallel.virtual_stages == 1 else config.parallel.pipeline


def _config(dtype: str, **parallel: int | str):
    config = toy_config(**parallel)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=dtype))


def _engine_state(engine) -> dict[str, torch.Tensor]:
    """All that a step may change on this rank."""
    values = {f"model.{name}": value for name, value in engine.model_values().items()} | engine.optimizer_values()
    tensors = {
        f"{name}.{number}": piece.tensor.clone()
        for name, value in values.items()
        for number, piece in enumerate(value.pieces)
    }
    return tensors | {"step": torch.tensor(engine.optimizer_step())}


def _changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def _poisoned_keys(topology, config) -> tuple[int, ...]:
    packs = toy_packs(topology.data_rank, topology.data_size, _num_micro(config), config)
    return tuple(packs[POISONED_MICRO].sample_keys.tolist())


def _with_nan(batch: list, field: str) -> list:
    values = getattr(batch[POISONED_MICRO], field).clone()
    values.view(-1)[0] = math.nan
    poisoned = dataclasses.replace(batch[POISONED_MICRO], **{field: values})
    return [poisoned if number == POISONED_MICRO else inputs for number, inputs in enumerate(batch)]


def _fail_once(stage, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes what the last stage returns for one micro-batch of the next step, and never again."""
    losses, calls = stage.losses, []

    def faulty(hidden: torch.Tensor, inputs) -> torch.Tensor:
        calls.append(1)
        sums = losses(hidden, inputs)
        return change(sums) if len(calls) == POISONED_MICRO + 1 else sums

    stage.losses = faulty


class _Rank:
    """The toy model on this rank, and what is said of its bad steps."""

    def __init__(self, config, folder: Path) -> None:
        self.config = config
        self.engine, self.topology = make_engine(config)
        from bitdance_scale.train.step_faults import StepFaults

        stages = [stage.number for stage in self.engine.stages]
        self.faults = StepFaults(self.topology, folder, stages, lambda key: (f"name_{key}", "a.tar"))
        self.num_steps = 0

    def batch(self) -> list:
        return step_inputs(self.config, self.topology, _num_micro(self.config), self.num_steps)

    def step(self, batch: list, refuses=None):
        from bitdance_scale.parallel.step import train_step
        from bitdance_scale.parallel.step_trace import StepTrace

        self.trace, self.num_steps = StepTrace(), self.num_steps + 1
        section = self.config.loss
        self.losses, outcome = train_step(
            self.engine, batch, section, 1e-3, self.topology, trace=self.trace, refuses=refuses
        )
        return outcome

    def readings(self, batch: list, *, is_repeated: bool) -> list:
        from bitdance_scale.train.step_faults import compute_again, read_trace

        again = compute_again(self.engine, batch, self.topology) if is_repeated else None
        packs = toy_packs(self.topology.data_rank, self.topology.data_size, _num_micro(self.config), self.config)
        return read_trace(self.trace, again, batch, [pack.sample_keys for pack in packs], self.config.loss)

    def explain_non_finite(self, batch: list) -> list[Fault]:
        return self.faults.explain_non_finite(self.num_steps, self.readings(batch, is_repeated=True))


@dataclasses.dataclass
class _Poisoned:
    """What a rank saw: of a step with a NaN in its data, of one with a NaN of the machine, and of a sound one."""

    is_skipped: bool
    grad_norm: float
    changed: set[str]
    from_data: list[Fault]
    from_machine: list[Fault]
    changed_by_sound_step: set[str]
    keys: tuple[int, ...]


def _poisoned_steps(rank: int, config, poisoned_rank: int, field: str, folder: Path) -> _Poisoned:
    run = _Rank(config, folder)
    is_poisoned = poisoned_rank in run.topology.replica_ranks
    before = _engine_state(run.engine)
    batch = _with_nan(run.batch(), field) if is_poisoned else run.batch()
    outcome = run.step(batch)
    changed = _changed(before, _engine_state(run.engine))
    from_data = run.explain_non_finite(batch)
    if is_poisoned and run.engine.stages[-1].is_last:
        _fail_once(run.engine.stages[-1], lambda sums: sums * math.nan)
    batch = run.batch()
    assert run.step(batch).is_skipped
    from_machine = run.explain_non_finite(batch)
    run.step(run.batch())
    return _Poisoned(
        outcome.is_skipped,
        outcome.grad_norm,
        changed,
        from_data,
        from_machine,
        _changed(before, _engine_state(run.engine)),
        _poisoned_keys(run.topology, config),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    # A NaN in the noise arises on the last stage, one in the bits on the first.
    ("layout", "engine", "field", "poisoned_rank", "replica_first_rank"),
    [
        ((1, 1, 2), {}, "noise", 1, 1),
        ((1, 2, 1), {}, "noise", 1, 0),
        ((1, 2, 1), {}, "vision_bits", 0, 0),
        ((1, 1, 2), {"zero_stage": 2}, "noise", 0, 0),
        ((1, 1, 2), {"zero_stage": 3}, "vision_bits", 1, 1),
        ((1, 1, 2), MEGATRON, "noise", 1, 1),
        ((1, 2, 1), MEGATRON, "vision_bits", 0, 0),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_names_rank_and_samples(
    dtype, layout, engine, field, poisoned_rank, replica_first_rank, tmp_path
):
    tensor, pipeline, data = layout
    config = _config(dtype, tensor=tensor, pipeline=pipeline, **engine)
    ranks = run_ranks(tensor * pipeline * data, _poisoned_steps, config, poisoned_rank, field, tmp_path)
    for seen in ranks:
        assert seen.is_skipped and not math.isfinite(seen.grad_norm)
        assert not seen.changed, "the refused step changed something"
        assert {"model", "master", "exp_avg", "step"} <= seen.changed_by_sound_step
    (fault,) = ranks[0].from_data
    assert (fault.cause, fault.rank, fault.micro_batch, fault.step) == ("data", poisoned_rank, POISONED_MICRO, 1)
    assert tuple(sample["key"] for sample in fault.samples) == ranks[replica_first_rank].keys
    (fault,) = ranks[0].from_machine
    last_rank = replica_first_rank + pipeline - 1
    assert (fault.cause, fault.rank, fault.micro_batch, fault.step) == ("machine", last_rank, POISONED_MICRO, 2)
    assert "the loss was nan and is" in fault.evidence
    assert read_records(tmp_path / FAULTS_FILE, Fault) == [*ranks[0].from_data, *ranks[0].from_machine]
    assert all(not seen.from_data and not seen.from_machine for seen in ranks[1:])


def _refused_step(rank: int, config, folder: Path):
    """(changed by a refused step, by the next one, norms seen by the rule, norms, faults, losses of the readings)."""
    run = _Rank(config, folder)
    run.step(run.batch())
    from bitdance_scale.train.step_guards import Spike

    before, asked = _engine_state(run.engine), []

    def refuses(losses, norm: float) -> bool:
        asked.append(norm)
        return True

    batch = run.batch()
    refused = run.step(batch, refuses)
    changed = _changed(before, _engine_state(run.engine))
    readings = run.readings(batch, is_repeated=False)
    faults = run.faults.explain_spike(2, Spike("loss", 9.0, 1.0, 2.0), True, readings)
    taken = run.step(batch, lambda losses, norm: bool(asked.append(norm)))
    assert refused.is_refused and not refused.is_skipped and not taken.is_refused
    norms, own = [refused.grad_norm, taken.grad_norm], [reading.loss for reading in readings]
    return changed, _changed(before, _engine_state(run.engine)), asked, norms, faults, own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("pipeline", "engine"),
    [(1, {}), (1, {"zero_stage": 2}), (1, {"zero_stage": 3}), (2, {}), (1, MEGATRON), (2, MEGATRON)],
)
def test_a_refused_step_leaves_everything_as_it_was(dtype, pipeline, engine, tmp_path):
    config = _config(dtype, pipeline=pipeline, **engine)
    ranks = run_ranks(2, _refused_step, config, tmp_path)
    for changed, changed_by_taken, asked, norms, _, _ in ranks:
        assert not changed
        # In bfloat16 a weight may keep its rounded value, but not all of them do.
        assert {"model", "master", "exp_avg", "exp_avg_sq", "step"} <= changed_by_taken
        # The same batch on the same weights: the refused step left no gradient behind either.
        assert asked == norms and norms[0] == norms[1]
    own = {
        (replica, micro): loss
        for replica, (*_, losses) in enumerate(ranks if pipeline == 1 else ranks[1:])
        for micro, loss in enumerate(losses)
    }
    named = [(fault.replica, fault.micro_batch) for fault in ranks[0][4]]
    assert named == sorted(own, key=lambda place: -own[place]), "the highest own losses come first"


def _broken_backward(rank: int, config, folder: Path):
    """(loss, norm, weights after one sound step that is watched, what is said of a backward pass that breaks)."""
    run = _Rank(config, folder)
    sound = run.step(run.batch(), lambda losses, norm: False)
    watched = run.losses.total, sound.grad_norm, _engine_state(run.engine)
    stage = run.engine.stages[-1]
    if stage.is_last:
        losses, calls = stage.losses, []

        def broken(hidden: torch.Tensor, inputs) -> torch.Tensor:
            calls.append(1)
            if len(calls) == POISONED_MICRO + 1 and hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient * math.nan)
            return losses(hidden, inputs)

        stage.losses = broken
    batch = run.batch()
    assert run.step(batch).is_skipped
    return *watched, run.explain_non_finite(batch)


def _unwatched(rank: int, config):
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import train_step

    losses, outcome = train_step(
        engine, step_inputs(config, topology, _num_micro(config), 0), config.loss, 1e-3, topology
    )
    return losses.total, outcome.grad_norm, _engine_state(engine)


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "rank_of_last_stage"),
    [
        (2, {"tensor": 2, "sequence_parallel": True, "recompute": "full"}, 0),
        (3, {"pipeline": 3, "virtual_stages": 2, "recompute": "full"}, 2),
    ],
)
def test_watching_changes_no_bit_and_sees_a_backward_pass_that_breaks(
    num_ranks, parallel, rank_of_last_stage, tmp_path
):
    config = _config("float32", **parallel)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=6))
    watched = run_ranks(num_ranks, _broken_backward, config, tmp_path)
    unwatched = run_ranks(num_ranks, _unwatched, config)
    for (loss, norm, state, _), (expected_loss, expected_norm, expected_state) in zip(watched, unwatched, strict=True):
        assert (loss, norm) == (expected_loss, expected_norm)
        assert not _changed(expected_state, state)
    (fault,) = watched[0][3]
    assert (fault.cause, fault.rank, fault.micro_batch) == ("backward", rank_of_last_stage, POISONED_MICRO)
