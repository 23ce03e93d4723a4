"""How much memory a rank of a tokenizer run needs, without allocating it.

The networks, losses and optimisers of the run take two steps on tensors without memory (`parallel/fake_ranks.py`), and
what they would allocate is logged, as `parallel/memory_estimate.py` does for text-to-image runs, with the same things
left out. Autocast keeps what it would on CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.observe.tokenizer_cost import tokenizer_flops
from bitdance_scale.parallel.fake_ranks import autocast_of_cuda, join_fake_job, no_memory
from bitdance_scale.parallel.memory_estimate import in_own_process
from bitdance_scale.parallel.memory_table import GIB, fits_in
from bitdance_scale.parallel.replicated import AVERAGE, fullest_share
from bitdance_scale.parallel.storage_log import StorageLog
from bitdance_scale.train import tokenizer_networks
from bitdance_scale.train.tokenizer_networks import TokenizerNetworks
from bitdance_scale.train.tokenizer_objective import Crops
from bitdance_scale.train.tokenizer_start import DISCRIMINATOR
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.perceptual import Lpips, Network, make_lpips
from bitdance_scale.wording import in_columns

# In the first step there are no moments yet.
_NUM_STEPS = 2
ASSUMED_UTILISATION = 0.35
"""Share of the peak rate that the cost in GPU-hours assumes; nothing of it was measured."""
GPU, GPU_FLOPS = "H100", 989.5e12


@dataclass(frozen=True)
class TokenizerBytes:
    """Bytes by purpose.

    Attributes:
        weights: of the autoencoder, float32.
        discriminator: its weights, float32.
        lpips: weights of VGG-16 and of LPIPS's linear layers, float32.
        gradients: of all that is trained, float32. Several ranks have them all the time, in the buckets in which they
            are reduced.
        moments: Adam's two of the parameters that the rank steps, float32.
        averages: averaged weights of the same, float32.
        inputs: crops and noise.
        buffers: temporary tensors of the optimiser.
        activations: what networks and losses make, autocast's copies of the weights included.
    """

    weights: int = 0
    discriminator: int = 0
    lpips: int = 0
    gradients: int = 0
    moments: int = 0
    averages: int = 0
    inputs: int = 0
    buffers: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class TokenizerMemory:
    """How much memory a rank needs.

    Attributes:
        rank: which rank it is.
        size_px: (height, width) of the crops.
        num_images: images of a step on this rank.
        held: bytes held between the backward passes of a step and the optimisers' steps.
        peak: bytes at the fullest moment of a step.
        building_peak: the most bytes before the first step.
        largest: name and bytes of the largest single activation or buffer at the peak.
    """

    rank: int
    size_px: tuple[int, int]
    num_images: int
    held: TokenizerBytes
    peak: TokenizerBytes
    building_peak: int
    largest: tuple[str, int]


def estimate_tokenizer_memory(config: TokenizerConfig, world_size: int) -> TokenizerMemory:
    """What the fullest rank of a job of `world_size` ranks needs on a GPU, computed in a separate process.

    The fullest rank is the one that steps the most parameters of the autoencoder; it is given as many images as any
    rank has, of the crop size that has the most pixels.

    Raises:
        ConfigError: LPIPS cannot be made, because its package is not installed.
    """
    rank = 0
    if config.parallel.shard_optimizer:
        rank = fullest_share(trained_sizes(config), world_size)
    return in_own_process(estimate_tokenizer_memory_here, config, world_size, rank, is_cuda=True)


def trained_sizes(config: TokenizerConfig) -> list[int]:
    """Elements of the autoencoder's parameters that are trained, in the order of the optimiser."""
    with torch.device("meta"):
        network = Autoencoder(**dataclasses.asdict(config.autoencoder))
    part = network.decoder if config.run.trains == "decoder" else network
    return [parameter.numel() for parameter in part.parameters()]


def estimate_tokenizer_memory_here(
    config: TokenizerConfig, world_size: int, rank: int, *, is_cuda: bool
) -> TokenizerMemory:
    """`estimate_tokenizer_memory` of any rank in this process, which joins the fake job for good.

    `is_cuda`: whether autocast is that of CUDA; otherwise that of the CPU.
    """
    join_fake_job(world_size, rank, ParallelSection())
    size_px, num_images = _most_pixels(config, world_size)
    lpips = []

    def blank_lpips(network: Network, _weights: Path) -> Lpips:
        lpips.append(make_lpips(network))
        return lpips[0]

    with (
        mock.patch.object(tokenizer_networks, "load_lpips", blank_lpips),
        no_memory() as log,
        autocast_of_cuda() if is_cuda else contextlib.nullcontext(),
    ):
        networks = TokenizerNetworks(config, torch.device("cpu"))
        building_peak = log.peak(0, log.position).total
        for network in lpips:
            log.assign([*network.parameters(), *network.buffers()], "lpips")
        _assign(log, networks)
        for step in range(_NUM_STEPS):
            start = log.position
            pixels = torch.zeros(num_images, 3, *size_px)
            crops = Crops(pixels, range(num_images), num_images=num_images * world_size)
            held = _take_step(log, networks, config, crops, config.adversarial.start_step + step)
        for storage, _ in log.events:
            if not storage.role:
                storage.role = "buffers" if storage.is_engine_made else "activations"
        peak = log.peak(start, log.position)
    largest = next(storage for storage in peak.storages if storage.role in ("buffers", "activations"))
    return TokenizerMemory(
        rank=rank,
        size_px=size_px,
        num_images=num_images,
        held=TokenizerBytes(**held),
        peak=TokenizerBytes(**peak.by_role),
        building_peak=building_peak,
        largest=(largest.maker, largest.nbytes),
    )


def _most_pixels(config: TokenizerConfig, world_size: int) -> tuple[tuple[int, int], int]:
    """The crop size of which a rank has the most pixels, and how many images of it."""
    images = {size: -(-(config.data.images_px // math.prod(size)) // world_size) for size in config.data.sizes_px}
    size_px = max(images, key=lambda size: images[size] * math.prod(size))
    return size_px, images[size_px]


def _take_step(
    log: StorageLog, networks: TokenizerNetworks, config: TokenizerConfig, crops: Crops, step: int
) -> dict[str, int]:
    """A step as `TokenizerJob.take_step` has it; what is held before the optimisers' steps, by role."""
    log.assign([crops.pixels], "inputs")
    outputs = networks.reconstruct(crops, step)
    losses = networks.backward(crops, outputs, step)
    _assign(log, networks)
    log.assign([*outputs, *losses.values()], "activations")
    held: Counter[str] = Counter()
    for storage in log.alive():
        # What networks and losses made is named or gone: what else is there are the gradients.
        storage.role = storage.role or "gradients"
        held[storage.role] += storage.nbytes
    networks.clip(config.optim.clip_norm)
    networks.step(config.optim.lr)
    return dict(held)


def _assign(log: StorageLog, networks: TokenizerNetworks) -> None:
    """Says what the tensors are for that stay."""
    for name, value in networks.model_values().items():
        role = "discriminator" if name.startswith(f"{DISCRIMINATOR}.") else "weights"
        log.assign([piece.tensor for piece in value.pieces], role)
    for name, value in networks.optimizer_values().items():
        role = "averages" if name.startswith(f"{AVERAGE}.") else "moments"
        log.assign([piece.tensor for piece in value.pieces], role)


def table(memories: Sequence[TokenizerMemory], device_gib: float, is_markdown: bool) -> str:
    """A line for each, in GiB, as text in columns or as a Markdown table."""
    roles = [field.name for field in dataclasses.fields(TokenizerBytes)]
    roles = [role for role in roles if any(getattr(memory.peak, role) for memory in memories)]
    rows = [["rank", *roles, "total", "largest at the peak", f"fits {device_gib:g} GiB"]]
    for memory in memories:
        name, size = memory.largest
        sizes = [*(getattr(memory.peak, role) for role in roles), memory.peak.total]
        needed = max(memory.peak.total, memory.building_peak)
        rows.append(
            [
                str(memory.rank),
                *(f"{size / GIB:.2f}" for size in sizes),
                f"{size / GIB:.2f} {name}",
                fits_in(needed, device_gib),
            ]
        )
    return in_columns(rows, is_markdown)


def remark(config: TokenizerConfig, memory: TokenizerMemory) -> str:
    """What the table does not say, and what the run costs, in sentences."""
    height, width = memory.size_px
    images_per_step = config.data.images_px // (height * width)
    flops = tokenizer_flops(config, memory.size_px)
    step_flops = flops.training * images_per_step
    hours = config.run.steps * step_flops / (ASSUMED_UTILISATION * GPU_FLOPS) / 3600
    return (
        f"{memory.num_images} images of {height} x {width} px on the fullest rank; at most "
        f"{memory.building_peak / GIB:.1f} GiB while the networks are built. {_rounded(flops.training / 1e9)} GFLOP "
        f"per image in training ({_rounded(flops.forward / 1e9)} the autoencoder's forward pass, "
        f"{_rounded(flops.lpips / 1e9)} LPIPS, {_rounded(flops.adversarial / 1e9)} the discriminator), "
        f"{step_flops / 1e15:.3g} PFLOP per step; {config.run.steps:,} steps are {_rounded(hours)} GPU-hours on "
        f"{GPU} at {ASSUMED_UTILISATION:.0%} of its peak (assumed)."
    )


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
