"""A gradient that is not finite on one rank stops the step on all of them, and nothing changes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config


def _poisoned_step(rank: int, config, poisoned_rank: int) -> tuple[bool, float, bool, bool]:
    """(is_skipped, norm, weights unchanged by the poisoned step, weights changed by a sound one)."""
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import train_step

    def weights() -> list[torch.Tensor]:
        return [piece.tensor.clone() for value in engine.model_values().values() for piece in value.pieces]

    before = weights()
    batch = step_inputs(config, topology, 1, 0)
    if rank == poisoned_rank:
        noise = batch[0].noise.clone()
        noise[0, 0, 0] = math.nan
        batch = [dataclasses.replace(batch[0], noise=noise)]
    _, outcome = train_step(engine, batch, config.loss, 1e-3, topology)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
    _, sound = train_step(engine, step_inputs(config, topology, 1, 0), config.loss, 1e-3, topology)
    changed = any(not torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
    return outcome.is_skipped, outcome.grad_norm, unchanged, changed and not sound.is_skipped


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    # The poisoned rank must hold the head: it is on the last stage.
    ("tensor", "pipeline", "data", "zero_stage", "poisoned_rank"),
    [(1, 1, 2, 1, 1), (1, 2, 1, 1, 1), (1, 1, 2, 2, 0), (1, 1, 2, 3, 1)],
)
def test_no_rank_takes_a_step_that_is_not_finite(dtype, tensor, pipeline, data, zero_stage, poisoned_rank):
    config = toy_config(tensor=tensor, pipeline=pipeline, zero_stage=zero_stage)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=dtype))
    for is_skipped, norm, unchanged, recovers in run_ranks(
        tensor * pipeline * data, _poisoned_step, config, poisoned_rank
    ):
        assert is_skipped and not math.isfinite(norm)
        assert unchanged, "the refused step changed weights"
        assert recovers, "the next sound step must change them"
