"""Names, sizes, initial values and refusals of the diffusion head."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitdance_scale.config.schema import HeadSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.diffusion_head import DiffusionHead, time_features
from bitdance_scale.model.initial import Init, initial_distribution
from bitdance_scale.model.linears import PlainLinears

SMALL = HeadSection(width=16, num_blocks=2, num_adaln=1, head_dim=8)


def make_head(section: HeadSection = SMALL, num_bits: int = 8, block_tokens: int = 4) -> DiffusionHead:
    return DiffusionHead(section, 12, num_bits, block_tokens, PlainLinears())


def test_published_names_and_shapes():
    linears = {
        "net.time_embed.mlp.0": (16, 256),
        "net.time_embed.mlp.2": (16, 16),
        "net.cond_embed": (16, 12),
        "net.input_proj": (16, 8),
        "net.ada_ln_blocks.0": (96, 16),
        "net.final_layer.ada_ln_modulation": (32, 16),
        "net.final_layer.linear": (8, 16),
    }
    for block in ("net.res_blocks.0", "net.res_blocks.1"):
        linears |= {
            f"{block}.norm1": (16,),
            f"{block}.attn.wqkv": (48, 16),
            f"{block}.attn.wo": (16, 16),
            f"{block}.norm2": (16,),
            f"{block}.w1": (48, 16),
            f"{block}.w2": (16, 24),
        }
    expected = {f"{name}.weight": shape for name, shape in linears.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    assert {name: tuple(tensor.shape) for name, tensor in make_head().state_dict().items()} == expected


def test_size_of_the_14b_head():
    with torch.device("meta"):
        head = DiffusionHead(HeadSection(width=5120), 5120, 32, 16, PlainLinears())
    assert round(sum(parameter.numel() for parameter in head.parameters()) / 1e9, 3) == 1.758


def test_time_features_tell_times_apart_in_float32():
    features = time_features(torch.tensor([0.0, 0.25], dtype=torch.bfloat16))
    assert features.dtype is torch.float32
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    # The slowest of the 128 angles is 250 * 10000^(-127/128) = 0.0269.
    assert features[1, 255].item() == pytest.approx(0.0269, abs=1e-4)


def test_no_block_gives_no_prediction_but_zero_gradients():
    head = make_head()
    found = head(torch.zeros(0, 4, 8), torch.zeros(0), torch.zeros(0, 4, 12))
    assert found.shape == (0, 4, 8)
    found.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 12}, "head.width = 16: must be a multiple of head.head_dim = 12"),
        ({"num_adaln": 3}, "head.num_blocks = 2: must be a multiple of head.num_adaln = 3"),
    ],
)
def test_sizes_that_do_not_divide(change, message):
    with pytest.raises(ConfigError, match=message):
        make_head(dataclasses.replace(SMALL, **change))


def test_more_partitions_than_heads():
    linears = PlainLinears()
    linears.num_partitions = 4
    with pytest.raises(ConfigError, match="parallel.tensor = 4: must divide the head's 2 attention heads"):
        DiffusionHead(SMALL, 12, 8, 4, linears)


def test_wrong_block_size_is_refused():
    with pytest.raises(ValueError, match="blocks hold 16 tokens, the head was built for 4"):
        make_head()(torch.zeros(1, 16, 8), torch.zeros(1), torch.zeros(1, 16, 12))


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("net.ada_ln_blocks.1.weight", Init("zeros")),
        ("net.ada_ln_blocks.1.bias", Init("zeros")),
        ("net.final_layer.ada_ln_modulation.weight", Init("zeros")),
        ("net.final_layer.linear.weight", Init("zeros")),
        ("net.time_embed.mlp.0.weight", Init("normal", std=0.02)),
        ("net.time_embed.mlp.2.bias", Init("zeros")),
        ("net.res_blocks.5.norm1.weight", Init("ones")),
        ("net.res_blocks.5.norm2.bias", Init("zeros")),
        ("net.res_blocks.5.attn.wqkv.weight", Init("xavier_uniform")),
        ("net.input_proj.weight", Init("xavier_uniform")),
        ("fc1.weight", Init("xavier_uniform")),
        ("fc2.bias", Init("zeros")),
    ],
)
def test_initial_distribution(name, init):
    assert initial_distribution(name) == init


def test_every_parameter_has_a_start():
    for name in make_head().state_dict():
        initial_distribution(name)
    with pytest.raises(KeyError, match="layers.0.mlp.weight"):
        initial_distribution("layers.0.mlp.weight")
