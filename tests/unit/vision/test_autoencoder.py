"""The network against the published names, sizes and formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bitdance_scale.vision.autoencoder import AdaptiveGroupNorm, Autoencoder, Upsample, published_config


def small(**changes: object) -> Autoencoder:
    sizes = {"num_bits": 8, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1} | changes
    torch.manual_seed(0)
    return Autoencoder(**sizes)


def test_published_sizes_have_the_published_parameter_count():
    with torch.device("meta"):
        network = Autoencoder(num_bits=32, channels=256, channel_mult=(1, 1, 2, 2, 4), num_res_blocks=4)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(460e6, rel=0.01)
    pixels = torch.empty(1, 3, 64, 32, device="meta")
    assert network.encode(pixels).shape == (1, 32, 4, 2)
    assert network.decode(network.encode(pixels)).shape == pixels.shape


def test_names_and_shapes_are_the_published_ones():
    """The list is written out from the description of the published checkpoint, for two levels and one block."""
    norm = {"weight", "bias"}
    block = {"norm1": norm, "conv1": {"weight"}, "norm2": norm, "conv2": {"weight"}}
    linear = conv = {"weight", "bias"}
    modules = {
        "encoder.conv_in": {"weight"},
        "encoder.down.0.downsample": conv,
        "encoder.down.1.block.0.nin_shortcut": {"weight"},
        "encoder.norm_out": norm,
        "encoder.conv_out": conv,
        "decoder.conv_in": conv,
        "decoder.up.0.block.0.nin_shortcut": {"weight"},
        "decoder.up.1.upsample.conv1": conv,
        "decoder.norm_out": norm,
        "decoder.conv_out": conv,
    }
    for level in (0, 1):
        modules |= {f"decoder.adaptive.{level}.gamma": linear, f"decoder.adaptive.{level}.beta": linear}
        for side in ("encoder.down", "decoder.up"):
            modules |= {f"{side}.{level}.block.0.{name}": part for name, part in block.items()}
    for side in ("encoder", "decoder"):
        modules |= {f"{side}.mid_block.0.{name}": part for name, part in block.items()}
    state = small().state_dict()
    assert set(state) == {f"{module}.{name}" for module, names in modules.items() for name in names}
    assert state["encoder.conv_out.weight"].shape == (8, 64, 1, 1)
    assert state["encoder.down.1.block.0.nin_shortcut.weight"].shape == (64, 32, 1, 1)
    # Level 1 leaves 64 channels, which the upsampling turns into four times as many before depth-to-space.
    assert state["decoder.up.1.upsample.conv1.weight"].shape == (256, 64, 3, 3)
    assert state["decoder.up.0.block.0.nin_shortcut.weight"].shape == (32, 64, 1, 1)
    assert state["decoder.adaptive.0.gamma.weight"].shape == (64, 8)


def test_upsampling_reads_channels_as_block_row_block_column_channel():
    upsample = Upsample(3)
    hidden = torch.randn(2, 3, 4, 5)
    wide, result = upsample.conv1(hidden), upsample(hidden)
    for row in (0, 1):
        for column in (0, 1):
            for channel in range(3):
                source = wide[:, (row * 2 + column) * 3 + channel]
                torch.testing.assert_close(result[:, channel, row::2, column::2], source, rtol=0, atol=0)


def test_adaptive_norm_is_linear_in_spread_and_mean_of_the_bits():
    torch.manual_seed(0)
    norm = AdaptiveGroupNorm(8, 64)
    torch.nn.init.normal_(norm.gamma.weight)
    torch.nn.init.normal_(norm.beta.weight)
    hidden, bits = torch.randn(2, 64, 4, 6), torch.randn(2, 8, 2, 3).sign()
    result = norm(hidden, bits)
    for n in range(2):
        flat = bits[n].reshape(8, 6)
        mean = flat.sum(dim=1) / 6
        spread = (((flat - mean[:, None]) ** 2).sum(dim=1) / 5 + 1e-6).sqrt()
        scale = norm.gamma.weight @ spread + norm.gamma.bias
        bias = norm.beta.weight @ mean + norm.beta.bias
        groups = hidden[n].reshape(32, -1)
        normed = (groups - groups.mean(dim=1, keepdim=True)) / (
            groups.var(dim=1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        expected = scale[:, None, None] * normed.reshape(64, 4, 6) + bias[:, None, None]
        # Two orders of summation in float32 over values of order 1.
        torch.testing.assert_close(result[n], expected, rtol=1e-4, atol=1e-5)


def test_residual_block_follows_its_formula():
    block = small().encoder.down[1].block[0]
    hidden = torch.randn(1, 32, 6, 6)

    def swish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    change = F.conv2d(
        swish(F.group_norm(hidden, 32, block.norm1.weight, block.norm1.bias, 1e-6)), block.conv1.weight, padding=1
    )
    change = F.conv2d(
        swish(F.group_norm(change, 32, block.norm2.weight, block.norm2.bias, 1e-6)), block.conv2.weight, padding=1
    )
    expected = F.conv2d(hidden, block.nin_shortcut.weight) + change
    # float32 rounding of x * sigmoid(x) against the fused SiLU.
    torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-5)


def test_encoded_bits_are_signs():
    bits = small().encode(torch.rand(2, 3, 8, 12) * 2 - 1)
    assert bits.shape == (2, 8, 4, 6)
    assert set(bits.unique().tolist()) == {-1.0, 1.0}


def test_published_config_has_the_published_keys():
    config = published_config(num_bits=32, channels=256, channel_mult=(1, 1, 2, 2, 4), num_res_blocks=4)
    assert config == {
        "ddconfig": {
            "double_z": False, "z_channels": 32, "in_channels": 3, "out_ch": 3, "ch": 256, "ch_mult": [1, 1, 2, 2, 4],
            "num_res_blocks": 4,
        },
        "gan_decoder": False,
    }  # fmt: skip
