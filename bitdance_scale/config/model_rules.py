"""Rules between the sizes of the backbone, the diffusion head and the autoencoder."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bitdance_scale.config.rule import RuleSet, divisors, nearest_multiples
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()
# Triton multiplies tiles of at least 16 x 16: FlexAttention's CUDA kernels refuse fewer channels (torch 2.11 to 2.13).
MIN_FLEX_HEAD_DIM = 16


@RULES.rule("model.num_heads", "model.num_kv_heads")
def _kv_heads_divide_heads(config: RunConfig) -> Iterator[str]:
    """`model.num_kv_heads` divides `model.num_heads`.

    Grouped-query attention gives every key/value head the same number of query heads.
    """
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = {model.num_heads}; "
            f"use one of {divisors(model.num_heads)}"
        )


@RULES.rule("model.head_dim")
def _rotary_channels_pair_up(config: RunConfig) -> Iterator[str]:
    """`model.head_dim` is even.

    Rotary positions turn channels in pairs.
    """
    head_dim = config.model.head_dim
    if head_dim % 2:
        yield f"model.head_dim = {head_dim}: must be even; use {head_dim - 1 or 2} or {head_dim + 1}"


@RULES.rule("model.attention", "model.head_dim")
def _flex_kernels_have_channels(config: RunConfig) -> Iterator[str]:
    """`model.head_dim` is at least 16 when `model.attention` is flex.

    FlexAttention's CUDA kernels multiply tiles of at least 16 channels.
    """
    model = config.model
    if model.attention == "flex" and model.head_dim < MIN_FLEX_HEAD_DIM:
        yield (
            f"model.attention = 'flex': needs model.head_dim >= {MIN_FLEX_HEAD_DIM}, it is {model.head_dim}; "
            "use model.attention = 'auto' or 'dense', or wider heads"
        )


@RULES.rule("model.hidden_size")
def _hidden_size_holds_2d_positions(config: RunConfig) -> Iterator[str]:
    """`model.hidden_size` is a multiple of 4.

    The 2-D position table has sines and cosines for each of two axes.
    """
    hidden_size = config.model.hidden_size
    if hidden_size % 4:
        yield f"model.hidden_size = {hidden_size}: must be a multiple of 4; use {nearest_multiples(hidden_size, 4)}"


@RULES.rule("head.width", "head.head_dim")
def _head_width_holds_heads(config: RunConfig) -> Iterator[str]:
    """`head.head_dim` divides `head.width`.

    The attention of the diffusion head cuts its width into heads.
    """
    head = config.head
    if head.width % head.head_dim:
        yield (
            f"head.width = {head.width}: must be a multiple of head.head_dim = {head.head_dim}; "
            f"use head.width = {nearest_multiples(head.width, head.head_dim)}"
        )


@RULES.rule("head.num_blocks", "head.num_adaln")
def _adaln_modules_share_blocks(config: RunConfig) -> Iterator[str]:
    """`head.num_adaln` divides `head.num_blocks`.

    Each adaLN module serves the same number of consecutive blocks.
    """
    head = config.head
    if head.num_blocks % head.num_adaln:
        yield (
            f"head.num_adaln = {head.num_adaln}: must divide head.num_blocks = {head.num_blocks}; "
            f"use one of {divisors(head.num_blocks)}"
        )


@RULES.rule("head.kind", "head.diff_batch_mul", "model.hidden_size", "vision.num_bits")
def _head_can_be_built(config: RunConfig) -> Iterator[str]:
    """`head.kind` is not token, and `head.diff_batch_mul` is 1 where it is bitwise.

    A classifier of whole tokens has a column for each of the 2^num_bits of them (Table 13). A bit-wise head has neither
    times nor noise to draw.
    """
    head, bits = config.head, config.vision.num_bits
    if head.kind == "token":
        size = config.model.hidden_size
        exponent = math.log10(size) + bits * math.log10(2)
        yield (
            f"head.kind = 'token': its linear would have {size} x 2^{bits} parameters (model.hidden_size, "
            f"vision.num_bits), about 10^{exponent:.1f}; use 'diffusion' or 'bitwise'"
        )
    if head.kind == "bitwise" and head.diff_batch_mul != 1:
        yield f"head.diff_batch_mul = {head.diff_batch_mul}: head.kind = 'bitwise' draws no times; set it to 1"


@RULES.rule("vision.num_bits", "vision.latents")
def _bits_fill_bytes(config: RunConfig) -> Iterator[str]:
    """`vision.num_bits` is a multiple of 8 where `vision.latents` is bits.

    Vision tokens are stored and sent as packed bytes.
    """
    num_bits = config.vision.num_bits
    if config.vision.latents == "bits" and num_bits % 8:
        yield f"vision.num_bits = {num_bits}: must be a multiple of 8; use {nearest_multiples(num_bits, 8)}"


@RULES.rule("vision.channels", "vision.channel_mult", "vision.norm_groups", "vision.latents")
def _channels_fill_norm_groups(config: RunConfig) -> Iterator[str]:
    """With bits, `vision.norm_groups` divides `vision.channels` times each of `vision.channel_mult`.

    The binary autoencoder normalises its channels in groups, 32 of them in the published release.
    """
    vision = config.vision
    if vision.latents != "bits":
        return
    groups = vision.norm_groups
    undivided = [multiplier for multiplier in vision.channel_mult if vision.channels * multiplier % groups]
    if undivided:
        yield (
            f"vision.channels = {vision.channels}: {vision.channels} x {undivided[0]} (of vision.channel_mult) must be "
            f"a multiple of vision.norm_groups = {groups}; use vision.channels = "
            f"{nearest_multiples(vision.channels, groups)}"
        )


@RULES.rule("vision.latents", "model.family", "head.kind", "vision.flip_max", "vision.gan_decoder")
def _continuous_latents_are_real_numbers(config: RunConfig) -> Iterator[str]:
    """With `vision.latents = "continuous"` the head is an unbounded diffusion head, and nothing is specific to bits.

    Latents are no signs: a sigmoid cannot reach them, a bit-wise head cannot classify them, and flips mean nothing. An
    AutoencoderKL has no decoder that takes noise.
    """
    if config.vision.latents != "continuous":
        return
    named = "vision.latents = 'continuous'"
    if config.model.parts.head_output != "bits":
        yield (
            f"{named}: the head of model.family = {config.model.family!r} predicts values between -1 and 1; set "
            "model.family=class_conditional, or vision.latents=bits"
        )
    if config.head.kind == "bitwise":
        yield f"head.kind = 'bitwise': {named} has no bits to classify; set head.kind=diffusion"
    if config.vision.flip_max:
        yield f"vision.flip_max = {config.vision.flip_max}: {named} has no bits to flip; set it to 0"
    if config.vision.gan_decoder:
        yield f"vision.gan_decoder = true: {named} has no decoder that takes noise; set it to false"
