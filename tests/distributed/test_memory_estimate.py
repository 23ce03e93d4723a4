"""The memory estimate of a rank against what ranks of a real job allocate."""

from __future__ import annotations

import dataclasses

import pytest

from bitdance_scale.config.lora_schema import LoraSection
from tests.distributed.measured_run import estimate, measure, wide_config
from tests.distributed.spawn import run_ranks

# Both sides run the same code and agreed to 1e-4 in every layout; the bound is what docs/memory.md promises.
RELATIVE_BOUND = 0.03
# Replicas share out whole boxes, and a model this small has few; ZeRO-3 keeps small weights gathered besides.
HOST_COPY_BOUND = 0.1

# (ranks, settings of `parallel`, dtype, fused AdamW)
LAYOUTS = [
    pytest.param(2, {}, "float32", False, marks=pytest.mark.large),
    pytest.param(2, {"zero_stage": 2}, "bfloat16", False, marks=pytest.mark.large),
    pytest.param(2, {"zero_stage": 3}, "bfloat16", False, marks=pytest.mark.large),
    pytest.param(2, {"pipeline": 2}, "bfloat16", False, marks=pytest.mark.large),
    pytest.param(
        4, {"tensor": 2, "sequence_parallel": True, "recompute": "full"}, "bfloat16", False, marks=pytest.mark.large
    ),
    pytest.param(
        4,
        {"tensor": 2, "sequence_parallel": True, "optimizer": "megatron", "recompute": "full"},
        "bfloat16",
        False,
        marks=pytest.mark.large,
    ),
    pytest.param(2, {"pipeline": 2, "optimizer": "megatron"}, "bfloat16", False, marks=pytest.mark.large),
    (2, {"optimizer": "megatron"}, "float32", False),
    # The others are in bfloat16, which these processors compute slowly.
    (2, {"tensor": 2, "sequence_parallel": True, "recompute": "full"}, "float32", False),
]


@pytest.mark.parametrize(("world_size", "parallel", "dtype", "is_fused"), LAYOUTS)
def test_estimate_is_what_ranks_allocate(world_size, parallel, dtype, is_fused):
    _compare(wide_config(dtype, **parallel), world_size, is_fused)


@pytest.mark.parametrize(
    ("bits", "parallel"),
    [
        pytest.param(16, {"recompute": "full"}, marks=pytest.mark.large),
        (4, {"recompute": "full"}),
        pytest.param(8, {"recompute": "none"}, marks=pytest.mark.large),
        pytest.param(16, {"recompute": "selective", "tensor": 2}, marks=pytest.mark.large),
        pytest.param(16, {"zero_stage": 3}, marks=pytest.mark.large),
    ],
)
def test_estimate_of_a_run_with_adapters(bits, parallel):
    """Frozen weights take no gradient, no master and no moment, and few bits where that is asked for."""
    config = dataclasses.replace(wide_config("float32", **parallel), lora=LoraSection(rank=8, base_bits=bits))
    world_size = 1 if parallel.keys() == {"recompute"} else 2
    _compare(config, world_size, False)
    whole = dataclasses.replace(config, lora=LoraSection())
    frozen, trained = (run_ranks(1, estimate, each, world_size, 0, False)[0].held for each in (config, whole))
    for kind in ("gradients", "masters", "moments"):
        assert getattr(frozen, kind) < 0.25 * getattr(trained, kind)
    if bits < 16:
        # The tables of the vocabulary stay as they are.
        assert frozen.weights < 0.65 * trained.weights


def _compare(config, world_size, is_fused):
    measured = run_ranks(world_size, measure, config, is_fused, timeout_s=280)
    for rank in range(0, world_size, world_size // config.parallel.pipeline):
        found = run_ranks(1, estimate, config, world_size, rank, is_fused, timeout_s=280)[0]
        real = measured[rank]
        within = {"rel": RELATIVE_BOUND}
        assert found.held.weights == pytest.approx(real.storages["weights"], **within)
        assert found.held.masters == pytest.approx(real.storages["masters"], **within)
        assert found.held.moments == pytest.approx(real.storages["moments"], **within)
        assert found.held.buffers == pytest.approx(real.storages["buffers"], **within)
        # What is not named is a gradient; Megatron's engine names its buffer of them.
        gradients = real.held - sum(real.storages.values()) + real.storages.get("gradients", 0)
        assert found.held.gradients == pytest.approx(gradients, **within)
        # The measured rank makes its inputs before the measurement starts, and has no tokenizer.
        peak = found.peak.total - found.peak.inputs - found.peak.tokenizer
        assert peak == pytest.approx(real.peak, **within), f"rank {rank}"
        assert found.host_copy == pytest.approx(real.host_copy, rel=HOST_COPY_BOUND)
        if config.parallel.recompute == "none" and not config.lora.is_used:
            # If parameters alone decided the comparison, it would say nothing about activations.
            assert found.peak.activations > 0.25 * peak


def test_a_pipeline_keeps_more_activations_on_its_first_stage():
    config = wide_config("bfloat16", pipeline=2)
    first, last = (run_ranks(1, estimate, config, 2, rank, True)[0] for rank in (0, 1))
    assert (first.num_in_flight, last.num_in_flight) == (2, 1)
    assert first.building_peak > first.held.weights + first.held.masters + first.held.moments
