"""What a configuration of tokenizer training must keep to."""

from __future__ import annotations

from collections.abc import Iterator

from bitdance_scale.config.optim_rules import average_faults, fall_faults, floor_faults
from bitdance_scale.config.ranges import FolderName, demand
from bitdance_scale.config.schema import MIN_SPIKE_WINDOW, SCHEDULES, SPIKE_ACTIONS, WEIGHTS
from bitdance_scale.config.storage_rules import credential_faults, upload_faults
from bitdance_scale.config.tokenizer_schema import (
    OUTPUT_DTYPES,
    RECOMPUTED,
    SSIM_PX,
    TRAINED_PARTS,
    VGG_PX,
    TokenizerConfig,
)
from bitdance_scale.errors import ConfigError

_FINE_PX = 3
"""Least side of what the last two convolutions of the discriminator see: each takes a pixel off."""


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
        *_stage_faults(config),
        *_size_faults(config, world_size),
    ]
    if faults:
        raise ConfigError("the tokenizer configuration cannot be used:\n" + "\n".join(f"- {fault}" for fault in faults))


def _network_faults(config: TokenizerConfig) -> Iterator[str]:
    network, quantiser = config.autoencoder, config.quantiser
    if network.num_bits < 8 or network.num_bits % 8:
        yield f"autoencoder.num_bits = {network.num_bits}: bits fill whole bytes; use a multiple of 8"
    groups = network.norm_groups
    if groups < 1:
        yield f"autoencoder.norm_groups = {groups}: must be 1 or more"
    elif network.channels < groups or network.channels % groups:
        yield (
            f"autoencoder.channels = {network.channels}: the group norms have {groups} groups; use a multiple of "
            f"{groups}, or other autoencoder.norm_groups"
        )
    if not network.channel_mult or min(network.channel_mult) < 1:
        yield f"autoencoder.channel_mult = {list(network.channel_mult)}: name one positive multiplier per level"
    if network.num_res_blocks < 1:
        yield f"autoencoder.num_res_blocks = {network.num_res_blocks}: a level needs one; use 1 or more"
    groups = config.num_groups
    if groups < 1 or network.num_bits % groups or network.num_bits // groups > 16:
        yield (
            f"quantiser.num_groups = {quantiser.num_groups}: groups share the {network.num_bits} bits equally, at most "
            f"16 each (the entropy loss enumerates 2^bits codes); use {max(1, network.num_bits // 8)}"
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
        "quantiser.entropy_ramp_steps": config.quantiser.entropy_ramp_steps,
        "adversarial.channels": config.adversarial.channels,
        "adversarial.num_layers": config.adversarial.num_layers,
    }
    yield from (f"{name} = {value}: must be 1 or more" for name, value in at_least_one.items() if value < 1)
    above_zero = {
        "quantiser.temperature": config.quantiser.temperature,
        "run.long_timeout_s": config.run.long_timeout_s,
        "optim.lr": config.optim.lr,
        "optim.clip_norm": config.optim.clip_norm,
        "adversarial.rate_factor": config.adversarial.rate_factor,
    }
    yield from (f"{name} = {value}: must be above 0" for name, value in above_zero.items() if value <= 0)
    not_negative = {
        "run.seed": config.run.seed,
        "quantiser.entropy_weight": config.quantiser.entropy_weight,
        "quantiser.commit_weight": config.quantiser.commit_weight,
        "reconstruction.l1_weight": config.reconstruction.l1_weight,
        "reconstruction.l2_weight": config.reconstruction.l2_weight,
        "quantiser.entropy_ramp": config.quantiser.entropy_ramp,
        "reconstruction.edge_weight": config.reconstruction.edge_weight,
        "reconstruction.lpips_weight": config.reconstruction.lpips_weight,
        "adversarial.weight": config.adversarial.weight,
        "adversarial.start_step": config.adversarial.start_step,
        "adversarial.lecam_weight": config.adversarial.lecam_weight,
        "optim.weight_decay": config.optim.weight_decay,
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
        "adversarial.lecam_decay": config.adversarial.lecam_decay,
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
        "run.output_dtype": (config.run.output_dtype, OUTPUT_DTYPES),
        "optim.schedule": (optim.schedule, SCHEDULES),
        "optim.spike_action": (optim.spike_action, SPIKE_ACTIONS),
        "evaluate.weights": (config.evaluate.weights, WEIGHTS),
        "run.trains": (config.run.trains, TRAINED_PARTS),
        "parallel.recompute": (config.parallel.recompute, RECOMPUTED),
    }
    for name, (value, words) in choices.items():
        if value not in words:
            yield f"{name} = {value!r}: must be one of {', '.join(words)}"


def _stage_faults(config: TokenizerConfig) -> Iterator[str]:
    run, reconstruction = config.run, config.reconstruction
    if run.trains == "decoder" and not run.start_from:
        yield (
            'run.trains = "decoder" without run.start_from: encoder and bits would stay random; name the tokenizer '
            "whose encoder they are"
        )
    if reconstruction.lpips_weight and not reconstruction.lpips_weights:
        yield (
            f"reconstruction.lpips_weight = {reconstruction.lpips_weight} without reconstruction.lpips_weights: LPIPS "
            "needs the weights of VGG-16, which no package ships; name torchvision's vgg16-397923af.pth, or set the "
            "weight to 0"
        )
    if config.autoencoder.gan_decoder and not config.adversarial.weight:
        yield (
            "autoencoder.gan_decoder = true with adversarial.weight = 0: without a discriminator nothing rewards what "
            "the decoder makes of its noise; set adversarial.weight, or autoencoder.gan_decoder=false"
        )
    rest = (reconstruction.l1_weight, reconstruction.l2_weight, reconstruction.lpips_weight)
    if not any(rest):
        yield ("reconstruction.l1_weight, l2_weight and lpips_weight are 0: nothing says what the image is; set one")


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
        if height < 1 or width < 1:
            continue
        num_images, rest = divmod(config.data.images_px, height * width)
        if rest or num_images < 1:
            yield (
                f"data.images_px = {config.data.images_px}: must be a multiple of {height} * {width} px, so that a "
                "step has whole images; use one that all sizes divide"
            )
        elif num_images < world_size:
            yield (
                f"data.images_px = {config.data.images_px}: a step of {height} x {width} px has {num_images} images, "
                f"fewer than the {world_size} ranks; use {height * width * world_size} or more, or fewer ranks"
            )
    for height, width in config.evaluate.sizes_px:
        if 0 < min(height, width) < SSIM_PX:
            yield f"evaluate.sizes_px: {height} x {width} px: SSIM needs {SSIM_PX} px a side; use larger crops"
    if config.reconstruction.lpips_weight:
        for height, width in config.data.sizes_px:
            if 0 < min(height, width) < VGG_PX:
                yield (
                    f"data.sizes_px: {height} x {width} px: LPIPS needs sides of {VGG_PX} px or more; use larger "
                    "crops, or reconstruction.lpips_weight = 0"
                )
    if config.adversarial.weight and config.adversarial.num_layers >= 1:
        least = _FINE_PX * 2**config.adversarial.num_layers
        for height, width in config.data.sizes_px:
            if 0 < min(height, width) < least:
                yield (
                    f"data.sizes_px: {height} x {width} px: the discriminator's {config.adversarial.num_layers} layers "
                    f"need sides of {least} px or more; use larger crops, fewer adversarial.num_layers or "
                    "adversarial.weight = 0"
                )
