"""Gradients under bfloat16 against their sums in float64 over all micro-batches and replicas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from bitdance_scale.config.schema import RunConfig
from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

NUM_MICRO = 2
FLOAT32_EPS = 2.0**-24
BFLOAT16_EPS = 2.0**-9


def _config(**parallel: object) -> RunConfig:
    config = toy_config(**parallel)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dtype="bfloat16"))


def _worst_error(rank: int, config: RunConfig) -> tuple[float, float, float]:
    """(worst error of a gradient's element over the sum of its terms' sizes, norm of the step, norm of the sums)."""
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets

    sums: dict[str, torch.Tensor] = {}
    sizes: dict[str, torch.Tensor] = {}

    def note(name: str, gradient: torch.Tensor) -> None:
        # What autograd adds to a parameter's gradient, before the engine takes it.
        sums[name] = sums.get(name, 0) + gradient.double()
        sizes[name] = sizes.get(name, 0) + gradient.double().abs()

    for name, (parameter, _) in engine.parameters.items():
        parameter.register_hook(lambda gradient, name=name: note(name, gradient))
    batch = step_inputs(config, topology, NUM_MICRO, 0, is_lopsided=True)
    accumulate_gradients(engine, batch, count_targets(batch, topology), config.loss, topology)
    worst, square = 0.0, 0.0
    for name in engine.parameters:
        for terms in (sums[name], sizes[name]):
            dist.all_reduce(terms, group=topology.data_group)
            # The engine averages what was multiplied by the replicas.
            terms.div_(topology.data_size)
        found = engine.gradient(name).double().view_as(sums[name])
        is_there = sizes[name] > 0
        errors = (found - sums[name]).abs()[is_there] / sizes[name][is_there]
        worst = max(worst, float(errors.max()) if len(errors) else 0.0)
        square += float(sums[name].pow(2).sum())
    return worst, engine.step(config.optim.lr).grad_norm, square**0.5


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(4, 1), (2, 2), (2, 3)])
def test_gradients_are_summed_in_float32(num_ranks: int, zero_stage: int) -> None:
    for worst, norm, expected in run_ranks(num_ranks, _worst_error, _config(zero_stage=zero_stage)):
        # Every addition rounds once.
        assert worst < NUM_MICRO * num_ranks * FLOAT32_EPS
        assert norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(2, 1), (2, 2), (2, 3)])
def test_sums_in_bfloat16_are_coarser(num_ranks: int, zero_stage: int) -> None:
    """The other choice has half the traffic; the test above would notice it."""
    for worst, norm, expected in run_ranks(
        num_ranks, _worst_error, _config(zero_stage=zero_stage, reduce_dtype="bfloat16")
    ):
        # Of the sum, and of the terms that are sent.
        assert BFLOAT16_EPS / 4 < worst < (NUM_MICRO * num_ranks + 1) * BFLOAT16_EPS
        assert norm == pytest.approx(expected, rel=1e-2)
