"""Costs against the published sizes, counted modules and an O(n^2) reading of the mask; peak memory is a peak."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import HeadSection, ModelSection, NetworkConfig, VisionSection
from bitdance_scale.model.bit_head import BitHead
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector
from bitdance_scale.observe.cost import (
    PackCounts,
    count_pack,
    count_parameters,
    encode_flops,
    peak_flops,
    step_flops,
    utilisation,
)
from bitdance_scale.sequence.layout import ImageTokens, pack_samples
from bitdance_scale.sequence.pack import Sample
from bitdance_scale.vision.autoencoder import Autoencoder

QWEN3_VOCABULARY = 151936


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sections of a RunConfig that decide what a step costs."""

    model: ModelSection
    head: HeadSection
    vision: VisionSection
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(model=self.model, head=self.head, vision=self.vision)


LARGE = Sizes(
    ModelSection(num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=8, head_dim=128, ffn_size=17408),
    HeadSection(width=5120),
    VisionSection(weights=""),
)
SMALL = Sizes(
    ModelSection(num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=80),
    HeadSection(width=32, num_blocks=4, num_adaln=2, head_dim=16),
    VisionSection(weights="", num_bits=8, channels=32, channel_mult=(1, 2, 2), num_res_blocks=2, block_side=2),
)
TOKENS = ImageTokens(vision_start=1, vision_end=2, resolution=tuple(range(10, 80)), queries=tuple(range(100, 115)))


def sample(key: int, grid: tuple[int, int], num_text: int, predicts_image: bool = True) -> Sample:
    text = np.arange(num_text, dtype=np.int64)
    return Sample(key, grid, text, np.array([7], dtype=np.int64), 1, 1, predicts_image)


def test_the_14b_model_has_the_published_parameters():
    parts = count_parameters(LARGE, QWEN3_VOCABULARY)
    # In billions, to the digits that are published: Qwen3-14B has 14.768, the head 1.758.
    assert round(parts["backbone"] / 1e9, 2) == 13.21
    assert round(parts["embedding"] / 1e9, 3) == round(parts["output"] / 1e9, 3) == 0.778
    assert round((parts["backbone"] + parts["embedding"] + parts["output"]) / 1e9, 3) == 14.768
    assert round(parts["head"] / 1e9, 3) == 1.758
    assert round(parts["total"] / 1e9, 2) == 16.55


def test_tied_embeddings_count_once():
    tied = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, tie_embeddings=True))
    plain, tied_parts = count_parameters(SMALL, 100), count_parameters(tied, 100)
    assert tied_parts["output"] == 0
    assert plain["total"] - tied_parts["total"] == 100 * SMALL.model.hidden_size


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "14b"])
def test_head_and_projector_parameters_are_those_of_the_modules(sizes):
    parts = count_parameters(sizes, 100)
    with torch.device("meta"):
        head, projector = make_head(sizes), make_projector(sizes)
    assert parts["head"] == sum(parameter.numel() for parameter in head.parameters())
    assert parts["projector"] == sum(parameter.numel() for parameter in projector.parameters())


def test_a_bitwise_head_is_one_linear():
    config = dataclasses.replace(SMALL, head=dataclasses.replace(SMALL.head, kind="bitwise"))
    linear = BitHead(SMALL.model.hidden_size, SMALL.vision.num_bits, PlainLinears())
    assert count_parameters(config, 100)["head"] == sum(parameter.numel() for parameter in linear.parameters())
    flops = step_flops(config, 100, PackCounts(num_predicted=6, num_blocks=1)).head
    assert flops == 2 * 6 * linear.linear.weight.numel()


def test_a_vision_token_costs_what_the_design_says():
    pack = pack_samples([sample(0, (64, 64), num_text=200)], TOKENS, pack_multiple=128)
    flops = step_flops(LARGE, QWEN3_VOCABULARY, count_pack(pack))
    num_real = pack.num_positions - pack.num_padding
    # About 90 G dense and 5 G attention per vision token in 4.3k-token samples, forward and backward.
    dense = 3 * (flops.backbone / num_real + (flops.head + flops.projector) / 4096)
    assert dense == pytest.approx(90e9, rel=0.01)
    assert 3 * flops.attention / num_real == pytest.approx(5.3e9, rel=0.02)


def test_counts_leave_padding_out_and_add_up():
    first = pack_samples([sample(0, (4, 8), num_text=5)], TOKENS, pack_multiple=1)
    padded = pack_samples([sample(0, (4, 8), num_text=5)], TOKENS, pack_multiple=512)
    context = pack_samples([sample(1, (4, 4), num_text=3, predicts_image=False)], TOKENS, pack_multiple=64)
    assert count_pack(first) == count_pack(padded)
    both = pack_samples([sample(0, (4, 8), 5), sample(1, (4, 4), 3, predicts_image=False)], TOKENS, pack_multiple=64)
    assert count_pack(first) + count_pack(context) == count_pack(both)
    assert count_pack(context).num_predicted == 0
    assert count_pack(both).num_blocks == 2


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_head_flops_are_those_that_pytorch_counts(num_blocks):
    tokens, bits, cond_size = SMALL.vision.block_tokens, SMALL.vision.num_bits, SMALL.model.hidden_size
    head = make_head(SMALL)
    noisy = torch.randn(num_blocks, tokens, bits)
    # PyTorch counts the products of the plain attention kernel, but not those of the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        head(noisy, torch.rand(num_blocks), torch.randn(num_blocks, tokens, cond_size))
    counts = PackCounts(num_predicted=num_blocks * tokens, num_blocks=num_blocks)
    assert step_flops(SMALL, 100, counts).head == counter.get_total_flops()


def test_projector_flops_are_those_that_pytorch_counts():
    projector = make_projector(SMALL)
    with FlopCounterMode(display=False) as counter:
        projector(torch.ones(12, SMALL.vision.num_bits))
    assert step_flops(SMALL, 100, PackCounts(num_vision=12)).projector == counter.get_total_flops()


def test_attention_and_text_flops():
    flops = step_flops(SMALL, 100, PackCounts(num_visible_pairs=7, num_text_targets=3, num_positions=5))
    # Layers, heads, two products of head_dim multiply-adds; a multiply-add is two operations.
    assert flops.attention == 7 * 2 * 4 * 2 * 16 * 2
    assert flops.text == 2 * 3 * 48 * 100
    assert flops.backbone == 2 * 5 * 2 * (48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80)
    assert flops.training == 3 * flops.forward == 3 * (flops.attention + flops.text + flops.backbone)


def test_encoder_flops_are_those_that_pytorch_counts():
    section = SMALL.vision
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = Autoencoder(
            num_bits=section.num_bits,
            channels=section.channels,
            channel_mult=section.channel_mult,
            num_res_blocks=section.num_res_blocks,
        )
        network.encoder(torch.empty(2, 3, 32, 16))
    assert encode_flops(section, num_tokens=2 * 8 * 4) == counter.get_total_flops()


def test_encoding_a_1024_px_image_costs_17_tflop():
    assert encode_flops(LARGE.vision, num_tokens=64 * 64) == pytest.approx(17e12, rel=0.01)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(device, peak):
    assert peak_flops(device, "bfloat16") == peak


def test_utilisation():
    assert utilisation(8e15, step_s=2.0, num_devices=4, peak=1e15) == 1.0
    assert utilisation(8e15, step_s=2.0, num_devices=4, peak=None) is None


def make_head(sizes: Sizes) -> DiffusionHead:
    vision = sizes.vision
    return DiffusionHead(sizes.head, sizes.model.hidden_size, vision.num_bits, vision.block_tokens, PlainLinears())


def make_projector(sizes: Sizes) -> Projector:
    return Projector(sizes.vision.num_bits, sizes.model.hidden_size, PlainLinears())


HOLD_MEMORY = """
import torch
from bitdance_scale.observe.cost import memory_bytes
before = memory_bytes(torch.device("cpu"))
block = torch.ones(200 * 2**20, dtype=torch.uint8)
held = memory_bytes(torch.device("cpu"))
del block
print(held - before, memory_bytes(torch.device("cpu")) - held)
"""


def test_peak_memory_grows_by_what_is_held_and_stays():
    result = subprocess.run([sys.executable, "-c", HOLD_MEMORY], capture_output=True, text=True, check=True)
    grown, grown_after_release = map(int, result.stdout.split())
    # 200 MiB are written; memory freed before, and counted in the first peak, may serve a little of it.
    assert 150 * 2**20 < grown < 250 * 2**20
    # Linux keeps the count of resident pages per thread and adds it up now and then.
    assert abs(grown_after_release) < 2 * 2**20
