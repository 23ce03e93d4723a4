"""The decoder that takes noise against its formulas in plain PyTorch, and such an autoencoder in all tools."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import NewParts, open_source
from bitdance_scale.cli.evaluate_tokenizer import main as evaluate_main
from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.demo.shards import write_shards
from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.vision.autoencoder import Autoencoder, decoder_noise
from bitdance_scale.vision.tokenizer import VisionTokenizer, vision_digest
from bitdance_scale.vision.weights import load_autoencoder
from tests.released import edit_config, read_json, write_autoencoder, write_plain_qwen3, write_published

SIZES = {"num_bits": 16, "channels": 32, "channel_mult": (1, 2, 1), "num_res_blocks": 2, "gan_decoder": True}


def random_weights(network: torch.nn.Module) -> torch.nn.Module:
    """All weights random: the adaptive norms start as plain ones, which would hide what they see."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return network.eval().requires_grad_(False)


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def group_norm(state, name, x):
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def residual(state, name, x):
    change = F.conv2d(swish(group_norm(state, f"{name}.norm1", x)), state[f"{name}.conv1.weight"], padding=1)
    change = F.conv2d(swish(group_norm(state, f"{name}.norm2", change)), state[f"{name}.conv2.weight"], padding=1)
    shortcut = state.get(f"{name}.nin_shortcut.weight")
    return change + (x if shortcut is None else F.conv2d(x, shortcut))


def adapted(state, name, x, bits):
    num_cells = bits.shape[2] * bits.shape[3]
    mean = bits.sum(dim=(2, 3)) / num_cells
    variance = ((bits - mean[:, :, None, None]) ** 2).sum(dim=(2, 3)) / (num_cells - 1)
    scale = F.linear((variance + 1e-6).sqrt(), state[f"{name}.gamma.weight"], state[f"{name}.gamma.bias"])
    shift = F.linear(mean, state[f"{name}.beta.weight"], state[f"{name}.beta.bias"])
    groups = x.reshape(len(x), 32, -1)
    normed = (groups - groups.mean(dim=2, keepdim=True)) / (
        groups.var(dim=2, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    return scale[:, :, None, None] * normed.reshape(x.shape) + shift[:, :, None, None]


def upsampled(state, name, x):
    wide = F.conv2d(x, state[f"{name}.conv1.weight"], state[f"{name}.conv1.bias"], padding=1)
    num_images, channels, height, width = wide.shape
    # (row in block, column in block, channel) -> pixels.
    parts = wide.reshape(num_images, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(num_images, channels // 4, 2 * height, 2 * width)


def decoded(state, bits, noise, num_levels, num_blocks):
    """The release's decoder with noise: it joins the bits at the input, and the norms see the bits alone."""
    x = torch.cat([bits, noise], dim=1)
    x = F.conv2d(x, state["decoder.conv_in.weight"], state["decoder.conv_in.bias"], padding=1)
    for block in range(num_blocks):
        x = residual(state, f"decoder.mid_block.{block}", x)
    for level in range(num_levels - 1, -1, -1):
        x = adapted(state, f"decoder.adaptive.{level}", x, bits)
        for block in range(num_blocks):
            x = residual(state, f"decoder.up.{level}.block.{block}", x)
        if level > 0:
            x = upsampled(state, f"decoder.up.{level}.upsample", x)
    x = swish(group_norm(state, "decoder.norm_out", x))
    return F.conv2d(x, state["decoder.conv_out.weight"], state["decoder.conv_out.bias"], padding=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"), SIZES)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "release", autoencoder=SIZES)


def test_the_decoder_follows_its_formulas():
    network = random_weights(Autoencoder(**SIZES))
    bits, noise = torch.randn(2, 16, 3, 5).sign(), torch.randn(2, 16, 3, 5)
    expected = decoded(network.state_dict(), bits, noise, num_levels=3, num_blocks=2)
    # float32 sums of up to 576 terms in another order, over ten convolutions.
    torch.testing.assert_close(network.decoder(bits, noise), expected, rtol=1e-3, atol=1e-4)
    other = decoded(network.state_dict(), bits, -noise, num_levels=3, num_blocks=2)
    assert not torch.allclose(expected, other, atol=1e-2)


def test_noise_is_normal_and_a_function_of_the_bits():
    bits = torch.randn(3, 128, 8, 8, generator=torch.Generator().manual_seed(2)).sign()
    noise = decoder_noise(bits)
    assert noise.shape == bits.shape and noise.dtype == bits.dtype
    # 24,576 draws: the mean to within 0.0064, the variance to within 0.009, at one standard deviation.
    assert abs(noise.mean()) < 0.03 and abs(noise.var() - 1) < 0.04
    assert torch.equal(decoder_noise(bits[1:2]), noise[1:2])
    assert torch.equal(decoder_noise(bits.bfloat16()), noise.bfloat16())
    changed = bits.clone()
    changed[0, 0, 0, 0] *= -1
    assert abs(torch.corrcoef(torch.stack([decoder_noise(changed)[0].flatten(), noise[0].flatten()]))[0, 1]) < 0.05
    assert not torch.equal(decoder_noise(bits.reshape(3, 128, 4, 16))[0].flatten(), noise[0].flatten())


def test_only_the_first_convolution_differs_from_the_plain_decoder():
    with torch.device("meta"):
        plain = Autoencoder(**SIZES | {"gan_decoder": False}).state_dict()
        noisy = Autoencoder(**SIZES).state_dict()
    assert [*plain] == [*noisy]
    assert {name for name in plain if plain[name].shape != noisy[name].shape} == {"decoder.conv_in.weight"}
    assert noisy["decoder.conv_in.weight"].shape[1] == 2 * 16


def test_six_levels_of_32x_and_256_bits():
    with torch.device("meta"):
        network = Autoencoder(
            num_bits=256, channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=4, gan_decoder=True
        )
    pixels = torch.empty(1, 3, 128, 64, device="meta")
    bits = network.encode(pixels)
    assert bits.shape == (1, 256, 4, 2)
    assert network.decoder(bits, torch.empty_like(bits)).shape == pixels.shape


def test_a_release_goes_in_and_out_and_is_sampled(release, tmp_path):
    source = open_source(release, None)
    assert source.network.vision.gan_decoder
    import_release(source, tmp_path / "run")
    assert "gan_decoder = true" in (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    export_release(open_checkpoint(tmp_path / "run"), tmp_path / "out")
    assert read_json(tmp_path / "out" / "ae_config.json") == read_json(release / "ae_config.json")
    assert read_json(tmp_path / "out" / "ae_config.json")["gan_decoder"] is True

    pipeline = BitDancePipeline.from_pretrained(tmp_path / "out", device="cpu")
    settings = {"height": 16, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    drawn = [
        pipeline("a", generator=[torch.Generator().manual_seed(1)], output_type=kind, **settings).images[0]
        for kind in ("bits", "np", "np")
    ]
    assert (drawn[1] == drawn[2]).all()
    signs = torch.from_numpy(np.unpackbits(drawn[0], axis=-1).astype(np.float32) * 2 - 1)
    # Blocks of 4 x 4 cells side by side.
    bits = signs.reshape(2, 4, 4, 16).permute(3, 1, 0, 2).reshape(1, 16, 4, 8)
    pixels = decoded(load_file(tmp_path / "out" / "ae.safetensors"), bits, decoder_noise(bits), 3, 2)
    expected = (127.5 * pixels[0].permute(1, 2, 0) + 128).clamp(0, 255)
    # A byte is cut, not rounded, so that rounding errors move a value by one at most.
    assert (torch.from_numpy(drawn[1]) * 255 - expected.floor()).abs().max() <= 1.01


def test_a_qwen3_is_imported_with_one(weights, tmp_path):
    source = open_source(
        write_plain_qwen3(tmp_path / "qwen3"),
        NewParts(autoencoder=weights, head_width=128, head_blocks=2, head_adaln=1),
    )
    import_release(source, tmp_path / "run")
    section = source.network.vision
    tokenizer = VisionTokenizer(section, "cpu")
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    packed = tokenizer.encode([image])[0]
    assert torch.equal(tokenizer.decode(packed, (8, 8)), tokenizer.decode(packed, (8, 8)))
    overrides = ["vision.gan_decoder=true", f"vision.weights={weights}", "vision.num_bits=16", "vision.channels=32"]
    overrides += ["vision.norm_groups=32", "vision.channel_mult=[1,2,1]", "vision.num_res_blocks=2"]
    config = load_config("demo", overrides)
    check(config, 1)
    assert vision_digest(config.vision) == vision_digest(section)


def test_a_wrong_kind_is_refused(release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "release")
    edit_config(folder, "ae_config.json", gan_decoder=False)
    with pytest.raises(CheckpointError, match=r"decoder.conv_in.weight has shape \[32, 32, 3, 3\], expected \[32, 16"):
        open_source(folder, None)


@pytest.mark.parametrize("as_file", [False, True])
def test_evaluation(weights, tmp_path, capsys, as_file):
    where = weights.parent
    if as_file:
        # As the release's collection of tokenizers names them.
        where = tmp_path / "ae_d4c16.safetensors"
        shutil.copyfile(weights, where)
        shutil.copyfile(weights.with_name("ae_config.json"), tmp_path / "ae_d4c16_config.json")
    assert load_autoencoder(where).decoder.takes_noise
    write_shards(tmp_path / "shards", num_images=4, per_shard=4, seed=0)
    command = [str(where), str(tmp_path / "shards"), "--sizes", "32", "--images", "3", "--nproc=1"]
    tables = []
    for _ in range(2):
        assert evaluate_main(command) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert "| 32 x 32 |" in tables[0][2] and tables[0] == tables[1]
