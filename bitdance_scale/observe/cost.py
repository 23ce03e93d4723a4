"""What a step costs: parameters, floating-point operations, the utilisation of the hardware, and memory.

FLOPs are *model* FLOPs: the products that the mathematics asks for, two per multiply-add. Padding, pairs of positions
that do not see each other and recomputed activations are left out, whatever the kernels do, so that wasted work cannot
raise the utilisation. Norms, activations and rotations are left out too (below 1 %).
"""

from __future__ import annotations

import dataclasses
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitdance_scale.config.schema import (
    NUM_MODULATIONS,
    NUM_TIME_FEATURES,
    NUM_TOKEN_MODULATIONS,
    HeadSection,
    ModelSection,
    RunConfig,
    VisionSection,
)
from bitdance_scale.observe.adapter_cost import adapter_flops, backward_share
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.sequence.visibility import count_visible_pairs

STATUS_FILE = Path("/proc/self/status")
# A backward pass forms the gradients of both factors of every product.
TRAINING_OVER_FORWARD = 3

# Dense (not sparse) peak of the tensor cores in FLOP/s, from the vendor's data sheets. The first name contained in
# `torch.cuda.get_device_name()` counts. float32 is the rate without TF32, PyTorch's default.
PEAK_FLOPS = (
    ("B200", {"bfloat16": 2250.0e12, "float32": 75.0e12}),
    ("H200 NVL", {"bfloat16": 835.5e12, "float32": 60.0e12}),
    ("H200", {"bfloat16": 989.5e12, "float32": 67.0e12}),
    ("H100 NVL", {"bfloat16": 835.5e12, "float32": 60.0e12}),
    ("H100 PCIe", {"bfloat16": 756.5e12, "float32": 51.0e12}),
    ("H100", {"bfloat16": 989.5e12, "float32": 67.0e12}),
    ("A100", {"bfloat16": 312.0e12, "float32": 19.5e12}),
)


@dataclass(frozen=True)
class PackCounts:
    """What decides the cost of packs; counts of several packs add up.

    Attributes:
        num_positions: positions of samples, padding left out.
        num_visible_pairs: (query, key) pairs of positions where the query sees the key, a position itself included.
        num_vision: vision tokens at the input.
        num_encoded: vision tokens that the autoencoder makes.
        num_predicted: vision tokens predicted by the head.
        num_blocks: blocks predicted by the head.
        num_text_targets: text tokens predicted.
    """

    num_positions: int = 0
    num_visible_pairs: int = 0
    num_vision: int = 0
    num_encoded: int = 0
    num_predicted: int = 0
    num_blocks: int = 0
    num_text_targets: int = 0

    def __add__(self, other: PackCounts) -> PackCounts:
        sums = np.add(dataclasses.astuple(self), dataclasses.astuple(other))
        return PackCounts(*sums.tolist())


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of the parts of the model over some packs; forward pass only, except `training`.

    Attributes:
        backbone: products with weights of the backbone, at every position.
        attention: scores and weighted values of the backbone's attention, over visible pairs.
        head: diffusion head, attention within its blocks included.
        projector: vision tokens into the backbone.
        text: projection of text targets to the vocabulary.
        backward: the backward pass of everything.
        adapters: low-rank changes of linears.
    """

    backbone: int
    attention: int
    head: int
    projector: int
    text: int
    backward: int
    adapters: int = 0

    @property
    def forward(self) -> int:
        """One forward pass of the network; the frozen autoencoder is not in it (`encode_flops`)."""
        return self.backbone + self.attention + self.head + self.projector + self.text + self.adapters

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def count_pack(pack: Pack) -> PackCounts:
    """Counts of one pack, exact."""
    return PackCounts(
        num_positions=pack.num_positions - pack.num_padding,
        num_visible_pairs=count_visible_pairs(pack.document_ids, pack.block_ids),
        num_vision=len(pack.vision_positions),
        num_encoded=len(pack.vision_cells),
        num_predicted=len(pack.predict_positions),
        num_blocks=len(pack.predict_positions) // pack.block_tokens,
        num_text_targets=len(pack.text_targets),
    )


def step_flops(config: RunConfig, vocab_size: int, counts: PackCounts) -> StepFlops:
    """FLOPs of the packs counted.

    Args:
        config: sizes of the model.
        vocab_size: entries of the tokenizer, padding left out.
        counts: sum of `count_pack` over the packs of a step.
    """
    model = config.model
    # Scores and weighted values each take `head_dim` multiply-adds per pair and head.
    attention_per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    flops = StepFlops(
        backbone=2 * counts.num_positions * _layer_weights(model) * model.num_layers,
        attention=attention_per_pair * counts.num_visible_pairs,
        head=_head_flops(config, counts),
        projector=2 * counts.num_vision * _projector_weights(config),
        text=2 * counts.num_text_targets * model.hidden_size * vocab_size,
        backward=0,
    )
    if not config.lora.is_used:
        return dataclasses.replace(flops, backward=(TRAINING_OVER_FORWARD - 1) * flops.forward)
    adapters = adapter_flops(config, vocab_size, counts.num_positions, counts.num_predicted, counts.num_blocks)
    share = backward_share(config, vocab_size)
    # Both factors of the products of attention have a gradient, of those with a frozen weight one.
    backward = 2 * adapters + share * (flops.backbone + 2 * flops.attention) + flops.head
    backward += flops.text * (share > 0) + 2 * flops.projector * config.lora.train_projector
    return dataclasses.replace(flops, adapters=adapters, backward=round(backward))


def _head_flops(config: RunConfig, counts: PackCounts) -> int:
    """Forward FLOPs of the head."""
    head, cond_size, bits = config.head, config.model.hidden_size, config.vision.num_bits
    if head.kind == "bitwise":
        return 2 * counts.num_predicted * cond_size * 2 * bits
    has_attention = config.model.parts.head_attends(config.vision.block_tokens)
    per_token, per_block = _head_weights(head, cond_size, bits, has_attention)
    num_draws = head.diff_batch_mul
    # The condition of a token is embedded once for all draws.
    embedding = cond_size * head.width
    weights = counts.num_predicted * (num_draws * (per_token - embedding) + embedding)
    flops = 2 * (weights + num_draws * counts.num_blocks * per_block)
    pairs = num_draws * counts.num_predicted * config.vision.block_tokens if has_attention else 0
    return flops + 4 * head.num_blocks * head.width * pairs


def encode_flops(section: VisionSection, num_tokens: int) -> int:
    """Forward FLOPs of the autoencoder's encoder for images of `num_tokens` vision tokens in all.

    Follows `vision/autoencoder.py`: 3x3 convolutions, two per residual block, a 1x1 shortcut where channels change,
    a 3x3 stride-2 convolution between levels, residual blocks in the middle and a 1x1 projection to the bits. The
    encoder of an AutoencoderKL differs from the middle on; the products of its attention, which grow with the square of
    an image's tokens, are left out.
    """
    widths = [section.channels * multiplier for multiplier in section.channel_mult]
    cells = section.downsample**2
    weights = cells * 9 * 3 * section.channels
    width = section.channels
    for level, out_width in enumerate(widths):
        for _ in range(section.num_res_blocks):
            shortcut = width * out_width if width != out_width else 0
            weights += cells * (9 * width * out_width + 9 * out_width**2 + shortcut)
            width = out_width
        if level + 1 < len(widths):
            cells //= 4
            weights += cells * 9 * width**2
    weights += _encoder_end(section, width)
    return 2 * weights * num_tokens


def _encoder_end(section: VisionSection, width: int) -> int:
    """Weights of the encoder's middle and end, all used once per latent cell."""
    if section.latents == "bits":
        return section.num_res_blocks * 2 * 9 * width**2 + width * section.num_bits
    # Two residual blocks around an attention, then mean and variance by a 3x3 and a 1x1 convolution.
    num_outputs = 2 * section.num_bits
    return 2 * 2 * 9 * width**2 + 4 * width**2 + 9 * width * num_outputs + num_outputs**2


def count_parameters(config: RunConfig, vocab_size: int) -> dict[str, int]:
    """Parameters of each part that trains.

    Args:
        config: sizes of the model.
        vocab_size: entries of the tokenizer; rows that pad a split table are not counted.

    Returns:
        `embedding`, `backbone` (layers and final norm), `output` (0 when tied to the embedding), `head`, `projector`
        and their sum `total`.
    """
    model, family = config.model, config.model.parts
    norms_per_layer = 2 * model.hidden_size + (2 * model.head_dim if family.has_query_key_norms else 0)
    num_norms = 2 if family.has_input_norm else 1
    positions = config.classes.num_cells * model.hidden_size if family.head_cells == "learned" else 0
    inner = model.projector_size if family.projector == "gelu" else 2 * model.projector_size
    parts = {
        "embedding": vocab_size * model.hidden_size,
        "backbone": model.num_layers * (_layer_weights(model) + norms_per_layer) + num_norms * model.hidden_size,
        "output": vocab_size * model.hidden_size if family.has_text and not model.tie_embeddings else 0,
        "head": _head_parameters(config) + positions,
        "projector": _projector_weights(config) + inner + model.hidden_size,
    }
    return parts | {"total": sum(parts.values())}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device for dense products.

    Args:
        device_name: what `torch.cuda.get_device_name()` says; anything else on a CPU.
        dtype: `bfloat16` or `float32`.

    Returns:
        None when the device is not in the table: then there is no utilisation to speak of.
    """
    for name, rates in PEAK_FLOPS:
        if name in device_name:
            return rates[dtype]
    return None


def utilisation(training_flops: float, step_s: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation in 0..1.

    Args:
        training_flops: `StepFlops.training` of one optimiser step, over all ranks.
        step_s: seconds the step took.
        num_devices: devices that shared it.
        peak: `peak_flops` of one device; None makes the result None.
    """
    return None if peak is None else training_flops / (step_s * num_devices * peak)


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has used so far, in bytes.

    On a CUDA device that is what PyTorch's allocator had in use on it; on the CPU it is the resident set of the whole
    process, libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not `getrusage` on Linux: its maximum there includes that of the process that forked this one.
    peak_kib = re.search(r"^VmHWM:\s+(\d+) kB$", _status(), re.MULTILINE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak_kib is None else int(peak_kib[1]) * 1024


def _status() -> str:
    """What Linux tells of this process; empty elsewhere."""
    return STATUS_FILE.read_text(encoding="utf-8") if STATUS_FILE.exists() else ""


def _layer_weights(model: ModelSection) -> int:
    """Elements of the weight matrices of one backbone layer."""
    query_size = model.num_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim
    return model.hidden_size * (2 * query_size + 2 * kv_size + 3 * model.ffn_size)


def _projector_weights(config: RunConfig) -> int:
    """Elements of the weight matrices of the projector."""
    model = config.model
    num_stacked = 1 if model.parts.projector == "gelu" else 2
    return model.projector_size * (num_stacked * config.vision.num_bits + model.hidden_size)


def _head_weights(head: HeadSection, cond_size: int, num_bits: int, has_attention: bool) -> tuple[int, int]:
    """Elements of the head's weight matrices that are used per predicted token, and once per block (the time)."""
    width, hidden = head.width, head.mlp_size
    per_res_block = (4 * width**2 if has_attention else 0) + 3 * width * hidden
    per_adaln = (NUM_MODULATIONS if has_attention else NUM_TOKEN_MODULATIONS) * width**2
    ends = num_bits * width + cond_size * width + 2 * width**2 + width * num_bits
    per_block = NUM_TIME_FEATURES * width + width**2
    return head.num_blocks * per_res_block + head.num_adaln * per_adaln + ends, per_block


def _head_parameters(config: RunConfig) -> int:
    """Elements of all parameters of the head."""
    head, cond_size, bits = config.head, config.model.hidden_size, config.vision.num_bits
    if head.kind == "bitwise":
        return (cond_size + 1) * 2 * bits
    has_attention = config.model.parts.head_attends(config.vision.block_tokens)
    return sum(_head_weights(head, cond_size, bits, has_attention)) + _head_vectors(head, bits, has_attention)


def _head_vectors(head: HeadSection, num_bits: int, has_attention: bool) -> int:
    """Elements of the head's biases and norms."""
    width, hidden = head.width, head.mlp_size
    per_swiglu = 2 * width + 2 * hidden + width
    per_attention = 2 * width + 4 * width if has_attention else 0
    num_modulations = NUM_MODULATIONS if has_attention else NUM_TOKEN_MODULATIONS
    per_module = head.num_adaln * num_modulations * width
    return head.num_blocks * (per_swiglu + per_attention) + per_module + 6 * width + num_bits
