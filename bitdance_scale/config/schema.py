"""The configuration of a run: one frozen tree, one dataclass per TOML section.

Nothing else holds a setting: the DeepSpeed dictionary (`parallel/zero.py`) and Megatron's `TransformerConfig`
(`parallel/backbone.py`) are derived from this tree, so no number is written twice. Every field carries its meaning in
`doc`, which `bitdance config explain` and `docs/config.md` print. Rules that span fields are in `rules.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.config.benchmark_schema import RunBenchmark
from bitdance_scale.config.data_schema import DataSection
from bitdance_scale.config.families import FAMILIES, Family
from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.setting import setting
from bitdance_scale.config.shipped import setting_path


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the run is called and how long it is."""

    name: str = setting(doc="Name of the run folder, `<root>/<name>`.")
    root: str = setting("runs", doc="Folder that holds the run folders.")
    seed: int = setting(0, doc="Seed of everything random: initial weights, data order, noise.")
    steps: int = setting(doc="Optimiser steps in all; a run resumed at this step is complete.")
    stage: str = setting(
        "pt", doc="Stage of training: pt, ct, sft or distill; each starts from the one before it, or from a release."
    )
    start_from: str = setting(
        "",
        doc="Where a new run takes its weights from: a checkpoint, a run folder or an imported release, of any layout "
        "and dtype; or the copies of a run on S3 (`s3://BUCKET/PREFIX/NAME`) or one of them (`.../step_00000100`). "
        "Optimiser and counters start from nothing. Empty: random weights.",
    )
    start_weights: str = setting(
        "trained", doc="Which of its weights: trained or averaged (`optim.average_decay` of the run before)."
    )
    start_from_any: bool = setting(
        False, doc="Whether the start may be of any stage, and of a run that has not finished its own."
    )
    new_queries: str = setting(
        "repeat",
        doc="How query tokens that the start lacks begin, in distillation: repeat (the trained ones in turn), mean (of "
        "the trained ones, with small noise) or noise (normal, `model.init_std`).",
    )
    dtype: str = setting(
        "bfloat16", doc="Dtype of weights and activations: float32 or bfloat16 (master weights are float32 in both)."
    )
    timeout_s: float = setting(
        600.0,
        doc="Seconds without progress in a step after which the run counts as hung: all ranks write their stacks, the "
        "culprit is named and the job ends. 0: never.",
    )
    long_timeout_s: float = setting(
        3600.0,
        doc="The same of the start, the first step, checkpoints, evaluations and pictures; the timeout of all "
        "collectives.",
    )


def gated_projector_size(hidden_size: int) -> int:
    """Inner width of the gated projector of class-conditional networks (published release)."""
    return int(1.5 * hidden_size)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The network family, and the backbone: a decoder as Qwen3's (arXiv 2602.14041 Sec. 4.2, 4.3)."""

    preset: str = setting(
        "",
        doc="Name in `config/presets.py` that fills this section and `head.width`; explicit settings win.",
        example='"qwen3-0.6b"',
    )
    family: str = setting(
        "text_to_image",
        doc="What the network is made of: text_to_image (Sec. 4.3) or class_conditional (Sec. 4.2).",
    )
    num_layers: int = setting(doc="Transformer layers.")
    hidden_size: int = setting(doc="Width of the residual stream.")
    num_heads: int = setting(doc="Query heads.")
    num_kv_heads: int = setting(doc="Key/value heads (grouped-query attention).")
    head_dim: int = setting(128, doc="Channels per head.")
    ffn_size: int = setting(doc="Hidden width of the SwiGLU feed-forward.")
    norm_eps: float = setting(1e-6, doc="Epsilon of every RMSNorm.")
    rope_base: float = setting(1e6, doc="Base of the rotary position frequencies.")
    tie_embeddings: bool = setting(False, doc="Whether the output projection is the token embedding itself.")
    init_std: float = setting(0.02, doc="Standard deviation of the normal initial weights.")
    mask: str = setting(
        "block",
        doc="Who sees whom within a block of vision tokens: block (all each other, the release) or causal (only those "
        "before; the ablation of Table 14, which cannot be exported).",
    )
    attention: str = setting(
        "auto", doc="Attention of the backbone: flex (FlexAttention), dense, or auto (flex on CUDA, dense elsewhere)."
    )

    @property
    def parts(self) -> Family:
        """What the network is made of."""
        return FAMILIES[self.family]

    @property
    def projector_size(self) -> int:
        """Inner width of the projector of bits (published releases)."""
        return self.hidden_size if self.parts.projector == "gelu" else gated_projector_size(self.hidden_size)


@dataclass(frozen=True, kw_only=True)
class ClassesSection:
    """The condition of class-conditional networks (arXiv 2602.14041 Sec. 4.2); others have none."""

    num_classes: int = setting(0, doc="Classes; labels are 0 .. num_classes - 1. 0: the network has none.")
    map: str = setting(
        "",
        doc="File with the names of the classes, for labels and prompts that are names: a name per line in the order "
        "of their numbers, as `bitdance pack` writes classes.txt, or a JSON object of names and numbers. Empty: labels "
        "are numbers.",
    )
    num_tokens: int = setting(64, doc="Tokens that stand for the class in the sequence.")
    grid: tuple[int, int] = setting(
        (16, 16), doc="(height, width) in latent cells of every image; the head has a learned position for each."
    )

    @property
    def num_cells(self) -> int:
        """Vision tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def map_path(self) -> Path:
        """The file that `map` names."""
        return setting_path(self.map)


# Sizes of the head that no setting changes (published release): features of the flow time, and modulations per channel
# of an adaLN module (scale, shift and gate, of the attention and of the SwiGLU).
NUM_TIME_FEATURES = 256
NUM_MODULATIONS = 6
# The same where a block is one token and there is no attention (published class-conditional release).
NUM_TOKEN_MODULATIONS = 3


@dataclass(frozen=True, kw_only=True)
class HeadSection:
    """What predicts the bits of a block: the binary diffusion head (arXiv 2602.14041 Sec. 3.2, 3.3), or an ablation."""

    kind: str = setting(
        "diffusion",
        doc="diffusion, or bitwise: a linear that classifies every bit by itself, with cross-entropy (Table 13; cannot "
        "be exported, and has no other setting of this section). token, a class per token, is refused with its size.",
    )
    width: int = setting(doc="Width of the head; the release uses the backbone's hidden size.")
    num_blocks: int = setting(6, doc="Transformer blocks of the head.")
    num_adaln: int = setting(2, doc="adaLN modules, each shared by num_blocks / num_adaln consecutive blocks.")
    head_dim: int = setting(128, doc="Channels per attention head.")
    mlp_ratio: float = setting(1.5, doc="SwiGLU hidden width over `width`.")
    diff_batch_mul: int = setting(
        1, doc="Independent draws of flow time and noise per predicted block and step (the release's word)."
    )
    time_schedule: str = setting("logit_normal", doc="Training draw of t: logit_normal (release) or uniform.")
    time_mean: float = setting(-0.8, doc="Mean of the normal under the sigmoid of t.")
    time_std: float = setting(0.8, doc="Standard deviation of the normal under the sigmoid of t.")
    time_shift: float = setting(
        1.0, doc="Shift s of t -> t / (t + s (1 - t)), in training and sampling; 1 leaves t unchanged."
    )

    @property
    def mlp_size(self) -> int:
        """Hidden width of the SwiGLU, over all tensor-parallel ranks."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class VisionSection:
    """The visual tokenizer, binary (arXiv 2602.14041 Sec. 3.1) or continuous; frozen in text-to-image training."""

    latents: str = setting(
        "bits",
        doc="What a vision token is: bits, or continuous, the latents of a VAE (the ablation of Table 12: "
        "class-conditional networks only, needs diffusers, and cannot be exported).",
    )
    weights: str = setting(
        doc="Autoencoder weights (safetensors, published names); `asset:` begins a path inside the package. With "
        "continuous latents the folder of an AutoencoderKL: config.json and diffusion_pytorch_model.safetensors."
    )
    num_bits: int = setting(
        32, doc="Bits per vision token, or its continuous values: the latent channels of the autoencoder."
    )
    channels: int = setting(256, doc="Base channels `ch` of the autoencoder.")
    channel_mult: tuple[int, ...] = setting(
        (1, 1, 2, 2, 4), doc="Channel multiplier per level; downsampling is 2^(levels - 1)."
    )
    num_res_blocks: int = setting(4, doc="Residual blocks per level.")
    norm_groups: int = setting(32, doc="Groups of the group norms; 32 in all published tokenizers.")
    gan_decoder: bool = setting(False, doc="Whether the decoder also takes noise, as two of the published ones do.")
    precision: str = setting(
        "float32",
        doc="How the tokenizer multiplies on CUDA: float32, or tf32 (10 bits of mantissa, several times as fast; bits "
        "flip whose latents lie near 0).",
    )
    block_side: int = setting(4, doc="Side p of the block of p x p vision tokens predicted together.")
    order: str = setting(
        "block",
        doc="Order of vision tokens: block (block by block, the release) or raster (row by row, and the next p * p of "
        "them are a block; the ablation of Table 14, which cannot be exported).",
    )
    context: str = setting(
        "plain",
        doc="How an image that is only the context of a caption is laid (`data.image_to_text_share`): plain (no query "
        "tokens, and every position sees those before it, as in the release's inference) or queries (as an image to "
        "draw, as versions up to 0.2 trained it).",
    )
    flip_max: float = setting(
        0.1,
        doc="Input bits of images to draw are flipped with probability flip_max * u, u ~ U(0, 1) per element.",
    )

    @property
    def weights_path(self) -> Path:
        """Where the weights lie."""
        return setting_path(self.weights)

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def block_tokens(self) -> int:
        """Vision tokens per block, P = p * p."""
        return self.block_side**2

    @property
    def order_side(self) -> int:
        """Vision tokens follow in block raster order with blocks of this side; 1 is plain raster order."""
        return 1 if self.order == "raster" else self.block_side


@dataclass(frozen=True, kw_only=True)
class TextSection:
    """The text tokenizer."""

    kind: str = setting("huggingface", doc="huggingface (a local tokenizer folder) or sentencepiece (a .model file).")
    path: str = setting("", doc="Folder or file of the tokenizer; class-conditional networks have none.")
    max_caption_tokens: int = setting(512, doc="Longer captions are cut to this many tokens.")

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer lies."""
        return setting_path(self.path)


SPIKE_ACTIONS = ("log", "skip")
# A median and its deviation mean little over fewer values.
MIN_SPIKE_WINDOW = 8

SCHEDULES = ("constant", "linear", "cosine")
WEIGHTS = ("trained", "averaged")


@dataclass(frozen=True, kw_only=True)
class RateSection:
    """A learning rate that warms up, then stays or falls; every kind of training has it (`train/learning_rate.py`)."""

    lr: float = setting(1e-4, doc="Learning rate after warm-up.")
    warmup_steps: int = setting(2000, doc="Steps of linear warm-up from 0.")
    schedule: str = setting(
        "constant",
        doc="The rate after warm-up: constant (but for `decay_steps`), or linear or cosine, which fall from there to "
        "`lr_min` at `run.steps`.",
    )
    lr_min: float = setting(0.0, doc="Rate that it falls to.")
    decay_steps: int = setting(
        0, doc="With a constant schedule: last steps of `run.steps`, over which the rate falls linearly; 0: none."
    )


@dataclass(frozen=True, kw_only=True)
class OptimSection(RateSection):
    """AdamW; a rate that warms up, then stays (arXiv 2602.14041 Table 4) or falls (the class-conditional release)."""

    beta1: float = setting(0.9, doc="First-moment decay.")
    beta2: float = setting(0.95, doc="Second-moment decay.")
    eps: float = setting(1e-15, doc="AdamW epsilon.")
    weight_decay: float = setting(0.0, doc="Decoupled weight decay.")
    decays_vectors: bool = setting(True, doc="Whether it is also for parameters of one dimension: biases and norms.")
    decay_exempt: tuple[str, ...] = setting(
        (),
        doc="Parameters without weight decay, by their names in checkpoints; `*` stands for any characters.",
        example='["embedding.weight", "projector.*"]',
    )
    average_decay: float = setting(
        0.0, doc="Decay per step of the averaged weights, an exponential moving average in float32; 0: there is none."
    )
    clip_norm: float = setting(1.0, doc="Global gradient-norm clip; 0 switches it off.")
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
class LossSection:
    """Weights of the two losses, each a mean over the global batch (Sec. 4.3)."""

    vision_weight: float = setting(1.0, doc="Weight of the flow loss.")
    text_weight: float = setting(0.01, doc="Weight of the text cross-entropy.")


S3_SCHEME = "s3://"
"""A path that begins with it names an object, or objects; any other path names a file or a folder."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """When checkpoints are written, how many stay, and where they are copied to."""

    every_steps: int = setting(1000, doc="Steps between checkpoints; one is written at the end as well.")
    keep: int = setting(2, doc="Newest checkpoints kept; older ones are deleted after a commit.")
    keep_every_steps: int = setting(
        0, doc="Checkpoints of multiples of this step stay for ever, and so do their copies; 0: none."
    )
    in_background: bool = setting(
        True, doc="Whether training goes on while a checkpoint is written, from a copy of it in host memory."
    )
    fall_back: bool = setting(
        False,
        doc="Whether a run whose newest checkpoint is damaged resumes from the next older whole one; the launch "
        "scripts of Slurm set it.",
    )
    upload: str = setting(
        "",
        doc="Where every checkpoint is copied to in the background, `s3://BUCKET/PREFIX`: it goes to "
        "`<upload>/<run.name>/`. A run without a checkpoint of its own goes on from there. Empty: nowhere.",
        example='"s3://bucket/runs"',
    )
    upload_keep: int = setting(3, doc="Newest copies kept; older ones are deleted after a copy. 0: all.")
    upload_mb_per_s: float = setting(
        0.0, doc="Most that all ranks together send, in 2^20 bytes a second on average; 0: no limit."
    )
    upload_endpoint_url: str = setting(
        "",
        doc="Endpoint of an S3-compatible store, for `checkpoint.upload` and a `run.start_from` on S3; empty: as boto3 "
        "finds it, or Amazon's.",
    )
    upload_profile: str = setting("", doc="Profile of boto3's credentials for the same; empty: the default one.")


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """Losses on held-out images, always the same ones with the same noise and flow times; and scores of pictures."""

    shards: tuple[str, ...] = setting(
        (), doc="Held-out WebDataset tars, as `data.shards`; empty: no evaluation.", example='["data/demo_held_out"]'
    )
    every_steps: int = setting(
        1000, doc="Steps between evaluations; there is one before the first step and at the end."
    )
    images: int = setting(256, doc="Images, mixed over the resolutions as in training.")
    seed: int = setting(0, doc="Seed of which images, of noise and of flow times.")
    weights: str = setting("trained", doc="Weights that are evaluated: trained or averaged (`optim.average_decay`).")
    benchmarks: tuple[RunBenchmark, ...] = setting(
        (),
        doc="Benchmarks that are drawn and scored on the training ranks.",
        example='[{ benchmark = "demo-scenes", metrics = ["scenes"] }]',
    )


@dataclass(frozen=True, kw_only=True)
class SampleSection:
    """Images drawn from the model while it trains."""

    every_steps: int = setting(1000, doc="Steps between sample grids; one is drawn at the end as well. 0: never.")
    prompts: tuple[str, ...] = setting((), doc="Captions to draw.", example='["a red circle"]')
    size_px: tuple[int, int] = setting((512, 512), doc="(height, width) of the images in pixels.")
    num_steps: int = setting(50, doc="Solver steps per block.")
    guidance: float = setting(7.5, doc="Classifier-free guidance scale; 1 switches it off.")
    guidance_growth: str = setting(
        "constant",
        doc="Guidance over the blocks of an image: constant, or linear (grows from 1 at the first block towards the "
        "scale; the unconditional sequence draws a first block of its own; class-conditional release).",
    )
    sampler: str = setting("euler_maruyama", doc="euler_maruyama (release) or euler (Eq. 4).")
    use_cache: bool = setting(True, doc="Whether keys and values of earlier blocks are kept.")
    seed: int = setting(0, doc="Seed of the noise; image i uses stream i of it.")
    weights: str = setting("trained", doc="Weights that draw: trained or averaged (`optim.average_decay`).")


@dataclass(frozen=True, kw_only=True)
class ObserveSection:
    """What is logged, and where."""

    log_every_steps: int = setting(1, doc="Steps between lines of metrics.jsonl and W&B points.")
    wandb_project: str = setting("bitdance_scale", doc="W&B project.")
    wandb_mode: str = setting(
        "auto", doc="auto (online when an API key is configured, else offline), online, offline or disabled."
    )
    tensorboard: bool = setting(
        False, doc="Whether metrics and pictures go to `<run>/tensorboard` too; needs the package tensorboard."
    )
    profile_steps: tuple[int, ...] = setting(
        (), doc="Steps, from 1, of which a trace is written to `<run>/profile`; the first steps of a start are slower."
    )
    profile_ranks: tuple[int, ...] = setting((0,), doc="Ranks that write these traces.")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The sections that say what the network is: all of a configuration that its weights depend on."""

    model: ModelSection
    head: HeadSection
    vision: VisionSection
    text: TextSection = dataclasses.field(default_factory=TextSection)
    classes: ClassesSection = dataclasses.field(default_factory=ClassesSection)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run is made of."""

    run: RunSection
    model: ModelSection
    head: HeadSection
    vision: VisionSection
    data: DataSection
    parallel: ParallelSection
    optim: OptimSection
    loss: LossSection
    checkpoint: CheckpointSection
    sample: SampleSection
    observe: ObserveSection
    text: TextSection = dataclasses.field(default_factory=TextSection)
    classes: ClassesSection = dataclasses.field(default_factory=ClassesSection)
    evaluate: EvaluateSection = dataclasses.field(default_factory=EvaluateSection)
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)

    @property
    def network(self) -> NetworkConfig:
        """The sections that its weights depend on."""
        return NetworkConfig(model=self.model, head=self.head, vision=self.vision, text=self.text, classes=self.classes)
