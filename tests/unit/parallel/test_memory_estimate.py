"""The parts of the memory estimate against arithmetic, and that making it takes no memory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from bitdance_scale.config.load import load_config
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.observe.cost import count_parameters
from bitdance_scale.parallel.fake_ranks import no_memory, products_of_cuda
from bitdance_scale.parallel.memory_estimate import MemoryEstimate, estimate_memory_here
from bitdance_scale.parallel.memory_parts import Bytes, num_in_flight
from bitdance_scale.parallel.weight_gradients import AccumulatedProduct
from bitdance_scale.parallel.zero import deepspeed_config
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

CONFIG = CONFIGS / "pt_14b.toml"
VOCAB_SIZE = 151940
MIB = 2**20


def test_total_is_the_sum():
    assert (
        Bytes(weights=1, gradients=2, masters=3, moments=4, buffers=5, inputs=6, activations=7, tokenizer=8).total == 36
    )


@pytest.mark.parametrize(
    ("pipeline", "virtual_stages", "expected"),
    # 1F1B: a pass for every stage from here on. Interleaved: two per later rank, and a round per further stage.
    [(1, 1, [1]), (4, 1, [4, 3, 2, 1]), (4, 2, [11, 9, 7, 5])],
)
def test_passes_in_flight(pipeline, virtual_stages, expected):
    section = ParallelSection(pipeline=pipeline, virtual_stages=virtual_stages)
    assert [num_in_flight(section, rank) for rank in range(pipeline)] == expected


@pytest.mark.parametrize(("num_elements", "expected"), [(1000, 1000), (50_000, 5000)])
def test_reduction_buffer_is_no_larger_than_the_model(num_elements, expected):
    settings = deepspeed_config(toy_config(reduce_bucket_elements=5000), data_size=2, num_elements=num_elements)
    assert settings["zero_optimization"]["reduce_bucket_size"] == expected


@pytest.mark.parametrize(("on_cuda", "expected"), [(False, 30 * 20 * 2), (True, 0)])
def test_a_weight_gradient_is_added_to_its_sum_as_on_the_device(on_cuda, expected):
    """On a CPU the product of bfloat16 matrices lies beside the float32 sum for a moment; on CUDA it never exists."""
    with no_memory() as log, products_of_cuda() if on_cuda else contextlib.nullcontext():
        entered, arrived = (torch.empty(64, size, dtype=torch.bfloat16) for size in (20, 30))
        total = torch.zeros(30, 20)
        before, start = sum(storage.nbytes for storage in log.alive()), log.position
        AccumulatedProduct.wgrad_gemm_accum_fp32(entered, arrived, total)
        assert log.peak(start, log.position).total - before == expected


def _large(_rank: int) -> tuple[MemoryEstimate, int, int]:
    """(estimate of two layers at the 14B width, bytes that this process grew by at most, parameters)."""
    overrides = ["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.recompute=none"]
    config = load_config(CONFIG, [*overrides, "data.global_batch=80", "data.max_pack_tokens=8192"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    before = _resident("VmRSS")
    found = estimate_memory_here(config, VOCAB_SIZE, world_size=8, rank=0)
    return found, _resident("VmHWM") - before, count_parameters(config, VOCAB_SIZE)["total"]


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def test_a_model_of_many_gigabytes_takes_none():
    found, grown, num_parameters = run_ranks(1, _large, timeout_s=280)[0]
    assert found.peak.total > 30 * 2**30
    # The packs are real (some 20 MB each, with their masks), and PyTorch imports its shape rules late.
    assert grown < 1000 * MIB
    # bfloat16 under ZeRO-1 on 8 replicas: 2 bytes of weights and 4 of gradients for all, 4 + 8 for an eighth. Padding
    # to the replicas is below 1e-6.
    # With the table of positions of an axis, 256 coordinates by half the width.
    assert found.held.weights == pytest.approx(2 * (num_parameters + 256 * 5120 // 2), rel=1e-6)
    assert found.held.gradients == pytest.approx(4 * num_parameters, rel=1e-6)
    assert found.held.masters == pytest.approx(4 * num_parameters / 8, rel=1e-6)
    assert found.held.moments == pytest.approx(8 * num_parameters / 8, rel=1e-6)
