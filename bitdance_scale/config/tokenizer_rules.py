"""What a configuration of tokenizer training must keep to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitdance_scale.config.optim_rules import average_faults, fall_faults, floor_faults
from bitdance_scale.config.parallel_rules import profile_faults
from bitdance_scale.config.ranges import CONSTRAINTS, Choice, Constraint, NonEmpty, Range, range_violations
from bitdance_scale.config.schema import WEIGHTS
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
_COUNT = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, is_low_open=True)
_BELOW_ONE = Range(0, 1, is_high_open=True)

TOKENIZER_CONSTRAINTS: Mapping[str, Constraint] = {
    **CONSTRAINTS,
    "run.output": NonEmpty(),
    "run.output_weights": Choice(("auto", *WEIGHTS)),
    "run.output_dtype": Choice(OUTPUT_DTYPES),
    "run.trains": Choice(TRAINED_PARTS),
    "quantiser.temperature": _POSITIVE,
    "quantiser.entropy_weight": _NOT_NEGATIVE,
    "quantiser.entropy_ramp": _NOT_NEGATIVE,
    "quantiser.entropy_ramp_steps": _COUNT,
    "quantiser.commit_weight": _NOT_NEGATIVE,
    "quantiser.flip_max": _BELOW_ONE,
    "reconstruction.l1_weight": _NOT_NEGATIVE,
    "reconstruction.l2_weight": _NOT_NEGATIVE,
    "reconstruction.edge_weight": _NOT_NEGATIVE,
    "reconstruction.lpips_weight": _NOT_NEGATIVE,
    "adversarial.weight": _NOT_NEGATIVE,
    "adversarial.start_step": _NOT_NEGATIVE,
    "adversarial.channels": _COUNT,
    "adversarial.num_layers": _COUNT,
    "adversarial.lecam_weight": _NOT_NEGATIVE,
    "adversarial.lecam_decay": _BELOW_ONE,
    "adversarial.rate_factor": _POSITIVE,
    "parallel.recompute": Choice(RECOMPUTED),
    "data.shards": NonEmpty(),
    "data.max_zoom": Range(1),
    "data.max_skipped_share": _BELOW_ONE,
    # Every gradient is clipped, and a run may stop at the first skipped step.
    "optim.clip_norm": _POSITIVE,
    "optim.max_skipped_steps": _NOT_NEGATIVE,
    "evaluate.shards": NonEmpty(),
    "evaluate.num_images": _COUNT,
}
"""Setting -> what it may be, as `ranges.CONSTRAINTS`, whose settings mean the same here but for those named again."""


def check_tokenizer(config: TokenizerConfig, world_size: int | None) -> None:
    """Refuses what cannot be trained, before any process group exists; `world_size` as in `rules.check`.

    Raises:
        ConfigError: lists every broken rule: where, what value, the rule and the fix.
    """
    faults = [
        *credential_faults(config),
        *upload_faults(config.checkpoint),
        *_network_faults(config),
        *range_violations(config, TOKENIZER_CONSTRAINTS).values(),
        *floor_faults(config.optim),
        *fall_faults(config.optim),
        *average_faults(
            config.optim.average_decay,
            {"run.output_weights": config.run.output_weights, "evaluate.weights": config.evaluate.weights},
        ),
        *_stage_faults(config),
        # One rank is never without images.
        *_size_faults(config, world_size or 1),
        *(() if world_size is None else profile_faults(config.observe, world_size)),
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
