"""The memory estimate of a tokenizer run against what its ranks allocate."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bitdance_scale.config.load import load_config
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.parallel.fake_ranks import autocast_of_cuda
from bitdance_scale.parallel.replicated import fullest_share
from bitdance_scale.parallel.topology import make_topology, start_process_group
from bitdance_scale.train import tokenizer_networks
from bitdance_scale.train.tokenizer_memory import (
    TokenizerMemory,
    estimate_tokenizer_memory_here,
    trained_sizes,
)
from bitdance_scale.train.tokenizer_networks import TokenizerNetworks
from bitdance_scale.train.tokenizer_objective import Crops
from bitdance_scale.vision.perceptual import make_lpips
from tests.distributed.measured_run import addresses, allocated_peak
from tests.distributed.spawn import run_ranks

RELATIVE_BOUND = 0.01
# Columns and reordered weights within a convolution of the CPU: scratch space, which no log of tensors sees.
CONVOLUTIONS = ("aten::_slow_conv2d", "aten::mkldnn_convolution", "aten::convolution_backward")
SMALL = [
    "autoencoder.channel_mult=[1, 1, 2]", "data.sizes_px=[[32, 32]]", "data.images_px=12288", "adversarial.channels=8",
    "optim.average_decay=0.99", "adversarial.start_step=0",
]  # fmt: skip


def small(*settings: str) -> TokenizerConfig:
    return load_config("ae_small_d16c32", [*SMALL, *settings], TokenizerConfig)


def estimate(_rank: int, config: TokenizerConfig, world_size: int, rank: int, is_cuda: bool) -> TokenizerMemory:
    return estimate_tokenizer_memory_here(config, world_size, rank, is_cuda=is_cuda)


def measure(rank: int, config: TokenizerConfig, world_size: int) -> tuple[int, int]:
    """(elements whose moments the rank keeps, bytes at the fullest moment of the second step)."""
    start_process_group(timeout_s=120)
    make_topology(ParallelSection())
    height, width = config.data.sizes_px[0]
    num_images = config.data.images_px // (height * width)
    slots = range(rank, num_images, world_size)
    loaded = mock.patch.object(tokenizer_networks, "load_lpips", lambda network, _weights: make_lpips(network))
    with loaded, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        networks = TokenizerNetworks(config, torch.device("cpu"))
        for step in range(2):
            with record_function(f"step {step}"):
                take_step(networks, Crops(torch.rand(len(slots), 3, height, width), slots, num_images), step)
        left = addresses()
    values = networks.optimizer_values()
    moments = [value for name, value in values.items() if name.startswith(("exp_avg.encoder", "exp_avg.decoder"))]
    num_kept = sum(piece.tensor.numel() for value in moments for piece in value.pieces)
    return num_kept, allocated_peak(profiler, left, scratch_of=CONVOLUTIONS)


def take_step(networks: TokenizerNetworks, crops: Crops, step: int) -> None:
    outputs = networks.reconstruct(crops, step)
    networks.backward(crops, outputs, step)
    networks.clip(1.0)
    networks.step(1e-4)


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        pytest.param(1, ("parallel.recompute=none",), marks=pytest.mark.large),
        pytest.param(1, ("parallel.recompute=blocks",), marks=pytest.mark.large),
        pytest.param(1, ("parallel.recompute=blocks", "adversarial.weight=0"), marks=pytest.mark.large),
        pytest.param(1, ("run.dtype=float32",), marks=pytest.mark.large),
        pytest.param(1, ("reconstruction.lpips_weight=1", "reconstruction.lpips_weights=x"), marks=pytest.mark.large),
        (2, ("parallel.recompute=blocks",)),
    ],
)
def test_estimate_is_what_ranks_allocate(world_size, settings):
    config = small(*settings)
    measured = run_ranks(world_size, measure, config, world_size, timeout_s=280)
    kept = [num_kept for num_kept, _ in measured]
    sizes, fullest = trained_sizes(config), kept.index(max(kept))
    assert sum(kept) == sum(sizes) and fullest_share(sizes, world_size) == fullest
    (found,) = run_ranks(1, estimate, config, world_size, fullest, False, timeout_s=280)
    assert found.peak.total == pytest.approx(measured[fullest][1], rel=RELATIVE_BOUND)
    # If weights alone decided the comparison, it would say nothing about activations.
    assert found.peak.activations > 0.25 * found.peak.total


def normalise(_rank: int) -> list[tuple[torch.dtype, bool]]:
    """Dtype of a group norm under autocast, and whether it is contiguous, within `autocast_of_cuda` and after it."""
    hidden = torch.ones(2, 8, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(4, 8)
    results = []
    for context in (autocast_of_cuda(), contextlib.nullcontext()):
        with context, torch.autocast("cpu", torch.bfloat16):
            normed = norm(hidden)
        results.append((normed.dtype, normed.is_contiguous()))
    return results


def test_a_group_norm_is_in_float32_on_cuda():
    assert run_ranks(1, normalise)[0] == [(torch.float32, True), (torch.bfloat16, False)]
