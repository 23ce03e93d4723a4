"""The configuration of a tokenizer training run (arXiv 2602.14041 Sec. 3.1, 4.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bitdance_scale.config.schema import CheckpointSection, ObserveSection, RateSection
from bitdance_scale.config.setting import setting

TRAINED_PARTS = ("all", "decoder")
OUTPUT_DTYPES = ("float32", "bfloat16", "float16")
RECOMPUTED = ("none", "blocks")
SSIM_PX = 7
"""Side of the windows of SSIM: no image may have a shorter one."""
VGG_PX = 16
"""Shortest side of an image that VGG-16, and with it LPIPS, still has something of in its last layers."""
GROUP_BITS = 8
"""Bits of a group of the entropy loss where `quantiser.num_groups` does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRunSection:
    """What the run is called, how long it is and where the weights go."""

    name: str = setting(doc="Name of the run folder, `<root>/<name>`.")
    root: str = setting("runs", doc="Folder that holds the run folders.")
    output: str = setting(doc="Folder that receives ae.safetensors and ae_config.json.")
    output_weights: str = setting(
        "auto", doc="Weights that it receives: trained, averaged, or auto: averaged if the run averages weights."
    )
    output_dtype: str = setting(
        "float32", doc="Dtype in which they are stored: float32, bfloat16 or float16; networks compute in their own."
    )
    start_from: str = setting(
        "",
        doc="Published tokenizer whose weights the run starts with: a folder with ae.safetensors, or a weights file; "
        "empty: random weights. A run that goes on from its own checkpoint does not read it.",
    )
    trains: str = setting(
        "all",
        doc="What is trained: all, or decoder: encoder and bits stay those of `run.start_from`, and the terms of the "
        "quantiser are left out (second stage).",
    )
    seed: int = setting(0, doc="Seed of the initial weights, the data order, the crops, the bit flips and the noise.")
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
    channels: int = setting(256, doc="Base channels, a multiple of `norm_groups`.")
    channel_mult: tuple[int, ...] = setting(
        (1, 1, 2, 2, 4), doc="Channel multiplier per level; downsampling is 2^(levels - 1)."
    )
    num_res_blocks: int = setting(4, doc="Residual blocks per level.")
    norm_groups: int = setting(
        32,
        doc="Groups of the group norms; published tokenizers have 32. A group of one channel loses the image's mean "
        "brightness and contrast: narrow networks learn better with fewer.",
    )
    gan_decoder: bool = setting(
        False, doc="Whether the decoder takes noise beside the bits, so that it can make up detail."
    )

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class QuantiserSection:
    """Lookup-free quantisation and its losses (arXiv 2602.14041 Eq. 1, 2); defaults are those of WeTok."""

    num_groups: int = setting(
        0, doc="Groups of channels of the entropy loss; num_bits / num_groups is at most 16. 0: groups of 8 bits."
    )
    temperature: float = setting(0.01, doc="Temperature of the code distribution, in squared latent distance.")
    entropy_weight: float = setting(0.1, doc="Weight of E[H(q)] - H[E q], in nats, mean over groups.")
    entropy_ramp: float = setting(
        0.0, doc="The entropy weight is multiplied by 1 + entropy_ramp * max(0, 1 - step / entropy_ramp_steps)."
    )
    entropy_ramp_steps: int = setting(2000, doc="Steps of that ramp.")
    commit_weight: float = setting(0.25, doc="Weight of the mean squared distance of the latents from their signs.")
    flip_max: float = setting(
        0.0, doc="Bits are flipped with probability flip_max * u, u ~ U(0, 1) per image, for robustness."
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructionSection:
    """Losses of the decoded image, on pixels in [-1, 1]."""

    l1_weight: float = setting(1.0, doc="Weight of the mean absolute error.")
    l2_weight: float = setting(0.0, doc="Weight of the mean squared error.")
    edge_weight: float = setting(
        0.0, doc="Weight of the mean absolute error of differences between neighbouring pixels."
    )
    lpips_weight: float = setting(1.0, doc="Weight of the perceptual distance LPIPS on features of VGG-16.")
    lpips_weights: str = setting(
        "", doc="File of VGG-16's weights, torchvision's vgg16-397923af.pth or the same as safetensors."
    )


@dataclass(frozen=True, kw_only=True)
class AdversarialSection:
    """A patch discriminator with hinge loss and LeCam regulariser, and the loss that it gives the decoder."""

    weight: float = setting(
        0.1, doc="Weight of softplus(-mean logit per image) in the loss of the autoencoder; 0: there is none."
    )
    start_step: int = setting(0, doc="First step with a discriminator; before it the loss is without.")
    channels: int = setting(64, doc="Channels of its first convolution.")
    num_layers: int = setting(3, doc="Its convolutions between the first and the last; all but one halve the sides.")
    lecam_weight: float = setting(0.05, doc="Weight of the LeCam regulariser in the loss of the discriminator.")
    lecam_decay: float = setting(0.999, doc="Decay per step of the moving averages of the mean logits it uses.")
    rate_factor: float = setting(1.0, doc="Learning rate of the discriminator over that of the autoencoder.")


@dataclass(frozen=True, kw_only=True)
class TokenizerParallelSection:
    """Data parallelism, and what it costs in memory. None of it changes what is learned, but for rounding."""

    shard_optimizer: bool = setting(
        True, doc="Whether Adam's moments and the averaged weights are divided among the ranks (ZeRO-1)."
    )
    recompute: str = setting(
        "none", doc="What the backward pass computes again instead of keeping: none, or blocks (residual blocks)."
    )
    channels_last: bool = setting(
        False, doc="Whether images are laid out channels last, which tensor cores want; slower on CPUs."
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
    """Adam, the same for autoencoder and discriminator; by default with linear warm-up and a cosine to zero."""

    warmup_steps: int = setting(200, doc="Steps of linear warm-up from 0.")
    schedule: str = setting(
        "cosine",
        doc="The rate after warm-up: constant (but for `decay_steps`), or linear or cosine, which fall from there to "
        "`lr_min` at `run.steps`.",
    )
    beta1: float = setting(0.5, doc="First-moment decay.")
    beta2: float = setting(0.9, doc="Second-moment decay.")
    weight_decay: float = setting(0.0, doc="Decoupled weight decay, of all parameters.")
    average_decay: float = setting(
        0.0, doc="Decay per step of the averaged weights, an exponential moving average in float32; 0: there is none."
    )
    clip_norm: float = setting(1.0, doc="Global gradient-norm clip, of each network by itself.")
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
    data: TokenizerDataSection
    optim: TokenizerOptimSection
    evaluate: TokenizerEvaluateSection
    quantiser: QuantiserSection = dataclasses.field(default_factory=QuantiserSection)
    reconstruction: ReconstructionSection = dataclasses.field(default_factory=ReconstructionSection)
    adversarial: AdversarialSection = dataclasses.field(default_factory=AdversarialSection)
    parallel: TokenizerParallelSection = dataclasses.field(default_factory=TokenizerParallelSection)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    observe: ObserveSection = dataclasses.field(default_factory=lambda: ObserveSection(log_every_steps=50))

    @property
    def num_groups(self) -> int:
        """Groups of the entropy loss."""
        return self.quantiser.num_groups or max(1, self.autoencoder.num_bits // GROUP_BITS)
