"""The configuration of a tokenizer training run (arXiv 2602.14041 Sec. 3.1, 4.1), and its rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from bitdance_scale.config.optim_rules import average_faults, fall_faults, floor_faults
from bitdance_scale.config.ranges import FolderName, demand
from bitdance_scale.config.schema import (
    MIN_SPIKE_WINDOW,
    SCHEDULES,
    SPIKE_ACTIONS,
    WEIGHTS,
    CheckpointSection,
    ObserveSection,
    RateSection,
)
from bitdance_scale.config.setting import setting
from bitdance_scale.config.storage_rules import credential_faults, upload_faults
from bitdance_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenizerRunSection:
    """What the run is called, how long it is and where the weights go."""

    name: str = setting(doc="Name of the run folder, `<root>/<name>`.")
    root: str = setting("runs", doc="Folder that holds the run folders.")
    output: str = setting(doc="Folder that receives ae.safetensors and ae_config.json.")
    output_weights: str = setting(
        "auto", doc="Weights that it receives: trained, averaged, or auto: averaged if the run averages weights."
    )
    seed: int = setting(0, doc="Seed of the initial weights, the data order, the crops and the bit flips.")
    steps: int = setting(doc="Optimiser steps.")
    timeout_s: float = setting(600.0, doc="Seconds without progress in a step after which the run ends; 0: never.")
    long_timeout_s: float = setting(3600.0, doc="The same of the start, checkpoints, evaluations and collectives.")
    dtype: str = setting(
        "bfloat16", doc="Dtype of the convolutions in training: float32 or bfloat16 (autocast; weights stay float32)."
    )


@dataclass(frozen=True, kw_only=True)
class AutoencoderSection:
    """Sizes of the network; the text-to-image run repeats them in its [vision] section."""

    num_bits: int = setting(32, doc="Bits per vision token.")
    channels: int = setting(256, doc="Base channels, a multiple of 32.")
    channel_mult: tuple[int, ...] = setting(
        (1, 1, 2, 2, 4), doc="Channel multiplier per level; downsampling is 2^(levels - 1)."
    )
    num_res_blocks: int = setting(4, doc="Residual blocks per level.")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class QuantiserSection:
    """Lookup-free quantisation and its losses (arXiv 2602.14041 Eq. 1, 2)."""

    num_groups: int = setting(doc="Groups of channels of the entropy loss; num_bits / num_groups is at most 16.")
    temperature: float = setting(1.0, doc="Temperature of the code distribution, in squared latent distance.")
    entropy_weight: float = setting(0.02, doc="Weight of E[H(q)] - H[E q], in nats, mean over groups.")
    commit_weight: float = setting(0.1, doc="Weight of the mean squared distance of the latents from their signs.")
    flip_max: float = setting(
        0.0, doc="Bits are flipped with probability flip_max * u, u ~ U(0, 1) per image, for robustness."
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructionSection:
    """Pixel losses, on pixels in [-1, 1]."""

    l1_weight: float = setting(1.0, doc="Weight of the mean absolute error.")
    l2_weight: float = setting(1.0, doc="Weight of the mean squared error.")
    edge_weight: float = setting(
        0.5, doc="Weight of the mean absolute error of differences between neighbouring pixels."
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerDataSection:
    """Images to train on; captions are not used."""

    shards: tuple[str, ...] = setting(doc="WebDataset tars: files, folders, globs or brace lists.")
    index_dir: str = setting("", doc="Folder of the index; empty: `.bitdance_index` beside the first shard.")
    sizes_px: tuple[tuple[int, int], ...] = setting(
        doc="(height, width) of the crops; every step draws one size for all ranks."
    )
    images_px: int = setting(
        doc="Pixels per step over all ranks; with crops of H x W a step has images_px / (H W) images."
    )
    max_zoom: float = setting(
        1.25, doc="Crops are cut from images scaled to 1..max_zoom times the crop, never enlarged."
    )
    max_skipped_share: float = setting(
        0.001, doc="Training stops when unreadable images exceed this share (after 1000 images)."
    )
    read_threads: int = setting(2, doc="Threads per rank that read and decode.")


@dataclass(frozen=True, kw_only=True)
class TokenizerOptimSection(RateSection):
    """Adam; by default with linear warm-up and a cosine to zero."""

    warmup_steps: int = setting(200, doc="Steps of linear warm-up from 0.")
    schedule: str = setting(
        "cosine",
        doc="The rate after warm-up: constant (but for `decay_steps`), or linear or cosine, which fall from there to "
        "`lr_min` at `run.steps`.",
    )
    beta1: float = setting(0.9, doc="First-moment decay.")
    beta2: float = setting(0.99, doc="Second-moment decay.")
    average_decay: float = setting(
        0.0, doc="Decay per step of the averaged weights, an exponential moving average in float32; 0: there is none."
    )
    clip_norm: float = setting(1.0, doc="Global gradient-norm clip.")
    max_skipped_steps: int = setting(10, doc="Training stops after more consecutive skipped steps.")
    max_skipped_share: float = setting(
        0.2, doc="Training stops when more than this share of the last `skipped_window` steps was skipped."
    )
    skipped_window: int = setting(100, doc="Steps over which that share is taken.")
    spike_deviations: float = setting(
        20.0,
        doc="A loss or gradient norm this many deviations (1.4826 MAD, at least 5 % of the median) above the running "
        "median is a spike; 0: nothing is.",
    )
    spike_window: int = setting(128, doc="Steps of that median; nothing is a spike before there are as many.")
    spike_action: str = setting(
        "log", doc="What a spike does: log (the step is taken all the same) or skip (it changes nothing)."
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluateSection:
    """Reconstruction of held-out images, cropped to the centre."""

    shards: tuple[str, ...] = setting(doc="WebDataset tars of held-out images.")
    sizes_px: tuple[tuple[int, int], ...] = setting(doc="(height, width) at which PSNR is measured, each by itself.")
    num_images: int = setting(256, doc="Images per size, the first ones that need not be enlarged.")
    every_steps: int = setting(500, doc="Steps between evaluations; one runs at the end as well.")
    weights: str = setting("trained", doc="Weights that are evaluated: trained or averaged (`optim.average_decay`).")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Everything a tokenizer training run is made of."""

    run: TokenizerRunSection
    autoencoder: AutoencoderSection
    quantiser: QuantiserSection
    reconstruction: ReconstructionSection
    data: TokenizerDataSection
    optim: TokenizerOptimSection
    evaluate: TokenizerEvaluateSection
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    observe: ObserveSection = dataclasses.field(default_factory=lambda: ObserveSection(log_every_steps=50))


def check_tokenizer(config: TokenizerConfig, world_size: int) -> None:
    """Refuses what cannot be trained, before any process group exists.

    Raises:
        ConfigError: lists every broken rule: where, what value, the rule and the fix.
    """
    faults = [
        *credential_faults(config),
        *upload_faults(config.checkpoint),
        *_network_faults(config),
        *_range_faults(config),
        *floor_faults(config.optim),
        *fall_faults(config.optim),
        *average_faults(
            config.optim.average_decay,
            {"run.output_weights": config.run.output_weights, "evaluate.weights": config.evaluate.weights},
        ),
        *_size_faults(config, world_size),
    ]
    if faults:
        raise ConfigError("the tokenizer configuration cannot be used:\n" + "\n".join(f"- {fault}" for fault in faults))


def _network_faults(config: TokenizerConfig) -> Iterator[str]:
    network, quantiser = config.autoencoder, config.quantiser
    if network.num_bits < 8 or network.num_bits % 8:
        yield f"autoencoder.num_bits = {network.num_bits}: bits fill whole bytes; use a multiple of 8"
    if network.channels < 32 or network.channels % 32:
        yield f"autoencoder.channels = {network.channels}: the group norms have 32 groups; use a multiple of 32"
    if not network.channel_mult or min(network.channel_mult) < 1:
        yield f"autoencoder.channel_mult = {list(network.channel_mult)}: name one positive multiplier per level"
    if network.num_res_blocks < 1:
        yield f"autoencoder.num_res_blocks = {network.num_res_blocks}: a level needs one; use 1 or more"
    groups = quantiser.num_groups
    if groups < 1 or network.num_bits % groups or network.num_bits // groups > 16:
        yield (
            f"quantiser.num_groups = {groups}: groups share the {network.num_bits} bits equally, at most 16 each (the "
            f"entropy loss enumerates 2^bits codes); use {max(1, network.num_bits // 8)}"
        )
    if config.run.dtype not in ("float32", "bfloat16"):
        yield f"run.dtype = {config.run.dtype!r}: must be float32 or bfloat16"


def _range_faults(config: TokenizerConfig) -> Iterator[str]:
    if config.run.name not in (legal := FolderName()):
        yield f"run.name = {config.run.name!r}: {demand(legal)}"
    at_least_one = {
        "run.steps": config.run.steps,
        "observe.log_every_steps": config.observe.log_every_steps,
        "data.max_zoom": config.data.max_zoom,
        "data.read_threads": config.data.read_threads,
        "evaluate.num_images": config.evaluate.num_images,
        "evaluate.every_steps": config.evaluate.every_steps,
        "optim.skipped_window": config.optim.skipped_window,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
    }
    yield from (f"{name} = {value}: must be 1 or more" for name, value in at_least_one.items() if value < 1)
    above_zero = {
        "quantiser.temperature": config.quantiser.temperature,
        "run.long_timeout_s": config.run.long_timeout_s,
        "optim.lr": config.optim.lr,
        "optim.clip_norm": config.optim.clip_norm,
    }
    yield from (f"{name} = {value}: must be above 0" for name, value in above_zero.items() if value <= 0)
    not_negative = {
        "run.seed": config.run.seed,
        "quantiser.entropy_weight": config.quantiser.entropy_weight,
        "quantiser.commit_weight": config.quantiser.commit_weight,
        "reconstruction.l1_weight": config.reconstruction.l1_weight,
        "reconstruction.l2_weight": config.reconstruction.l2_weight,
        "reconstruction.edge_weight": config.reconstruction.edge_weight,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.lr_min": config.optim.lr_min,
        "optim.decay_steps": config.optim.decay_steps,
        "optim.max_skipped_steps": config.optim.max_skipped_steps,
        "run.timeout_s": config.run.timeout_s,
        "checkpoint.keep_every_steps": config.checkpoint.keep_every_steps,
        "optim.spike_deviations": config.optim.spike_deviations,
        "checkpoint.upload_keep": config.checkpoint.upload_keep,
        "checkpoint.upload_mb_per_s": config.checkpoint.upload_mb_per_s,
    }
    yield from (f"{name} = {value}: must not be negative" for name, value in not_negative.items() if value < 0)
    below_one = {
        "quantiser.flip_max": config.quantiser.flip_max,
        "optim.beta1": config.optim.beta1,
        "optim.beta2": config.optim.beta2,
        "optim.average_decay": config.optim.average_decay,
        "data.max_skipped_share": config.data.max_skipped_share,
    }
    if any(rank < 0 for rank in config.observe.profile_ranks):
        yield f"observe.profile_ranks = {list(config.observe.profile_ranks)}: ranks count from 0"
    if any(step < 1 for step in config.observe.profile_steps):
        yield f"observe.profile_steps = {list(config.observe.profile_steps)}: steps count from 1"
    yield from (f"{name} = {value}: must be in [0, 1)" for name, value in below_one.items() if not 0 <= value < 1)
    optim = config.optim
    if not 0 < optim.max_skipped_share <= 1:
        yield f"optim.max_skipped_share = {optim.max_skipped_share}: must be in (0, 1]"
    if optim.spike_window < MIN_SPIKE_WINDOW:
        yield f"optim.spike_window = {optim.spike_window}: must be {MIN_SPIKE_WINDOW} or more"
    choices = {
        "run.output_weights": (config.run.output_weights, ("auto", *WEIGHTS)),
        "optim.schedule": (optim.schedule, SCHEDULES),
        "optim.spike_action": (optim.spike_action, SPIKE_ACTIONS),
        "evaluate.weights": (config.evaluate.weights, WEIGHTS),
    }
    for name, (value, words) in choices.items():
        if value not in words:
            yield f"{name} = {value!r}: must be one of {', '.join(words)}"


def _size_faults(config: TokenizerConfig, world_size: int) -> Iterator[str]:
    multiple = config.autoencoder.downsample
    for name, sizes in (("data.sizes_px", config.data.sizes_px), ("evaluate.sizes_px", config.evaluate.sizes_px)):
        if not sizes:
            yield f"{name} is empty: name at least one (height, width)"
        for height, width in sizes:
            # The adaptive norms take a variance over cells, for which one cell is not enough.
            if height < 1 or width < 1 or height % multiple or width % multiple or height * width == multiple**2:
                yield (
                    f"{name}: {height} x {width} px: sides must be multiples of the downsampling, {multiple} px, and "
                    "hold more than one cell"
                )
    for height, width in config.data.sizes_px:
        if height > 0 and width > 0 and config.data.images_px % (height * width * world_size):
            yield (
                f"data.images_px = {config.data.images_px}: must be a multiple of {height} * {width} px * {world_size} "
                "ranks, so that every rank has the same number of images; use one that all sizes divide"
            )
