"""Continuous latents: the way through the tokenizer, with a stand-in for diffusers and with diffusers itself."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitdance_scale.config.load import load_config
from bitdance_scale.config.named_files import vision_faults
from bitdance_scale.config.schema import VisionSection
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.data.bit_shards import recipe
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.sequence.layout import block_raster_cells
from bitdance_scale.vision.codes import unpack_codes
from bitdance_scale.vision.tokenizer import VisionTokenizer, num_elements, vision_digest

CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.32.0",
    "latent_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
GRID = (4, 6)
WEIGHTS = "diffusion_pytorch_model.safetensors"


class StandIn(nn.Module):
    """One convolution each way, with as much of AutoencoderKL's interface as is used."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Conv2d(3, config["latent_channels"], 2, stride=2)
        self.decoder = nn.ConvTranspose2d(config["latent_channels"], 3, 2, stride=2)

    @classmethod
    def from_pretrained(cls, folder: str, *, use_safetensors: bool, local_files_only: bool, **_: object) -> tuple:
        assert use_safetensors and local_files_only
        network = cls(json.loads((Path(folder) / "config.json").read_text()))
        missing, unexpected = network.load_state_dict(load_file(Path(folder) / WEIGHTS), strict=False)
        return network, {"missing_keys": missing, "unexpected_keys": unexpected}

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: self.encoder(pixels)))

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(latents))


def write_folder(folder: Path, **changes: object) -> VisionSection:
    config = CONFIG | changes
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(StandIn(config).state_dict(), folder / WEIGHTS)
    return section_of(folder)


def section_of(folder: Path, **changes: object) -> VisionSection:
    sizes = {"num_bits": 4, "channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "block_side": 2}
    return VisionSection(**({"weights": str(folder), "latents": "continuous", "flip_max": 0.0} | sizes | changes))


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("diffusers")
    module.AutoencoderKL = StandIn
    monkeypatch.setitem(sys.modules, "diffusers", module)


def image() -> torch.Tensor:
    return torch.randint(0, 256, (8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def check_round_trip(
    section: VisionSection,
    encode: Callable[[torch.Tensor], torch.Tensor],
    decode: Callable[[torch.Tensor], torch.Tensor],
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """The codes of an image and their image, against the means of its distribution."""
    tokenizer = VisionTokenizer(section, "cpu")
    (code,) = tokenizer.encode([image()])
    assert code.dtype == np.uint8 and code.shape == (24, 16)
    with torch.no_grad():
        mean = encode((image().permute(2, 0, 1).float() / 127.5 - 1)[None])
        expected = ((mean - shift[:, None, None]) * scale[:, None, None])[0]
        pixels = decode(mean)[0].permute(1, 2, 0)
    rows = torch.stack([expected[:, row, column] for row, column in block_raster_cells(GRID, 2).tolist()])
    found = torch.from_numpy(unpack_codes(code, "continuous"))
    torch.testing.assert_close(found, rows)
    shown = (127.5 * pixels + 128).clamp(0, 255)
    for latents in (code, found):
        decoded = tokenizer.decode(latents, GRID).float()
        assert decoded.shape == (8, 12, 3) and float((decoded - shown).abs().max()) <= 1.01
    with pytest.raises(ValueError, match=r"not 4 bits per cell of grid \(4, 6\)"):
        tokenizer.decode(code[:, :15], GRID)


@pytest.mark.usefixtures("diffusers")
def test_codes_are_scaled_means_in_block_raster_order(tmp_path):
    section = write_folder(tmp_path)
    network = StandIn.from_pretrained(str(tmp_path), use_safetensors=True, local_files_only=True)[0]
    check_round_trip(section, network.encoder, network.decoder, torch.full((4,), 0.25), torch.full((4,), 0.5))
    # Values per channel take the place of the shift, and divide the scale.
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 4.0]
    section = write_folder(tmp_path, latents_mean=mean, latents_std=std)
    check_round_trip(section, network.encoder, network.decoder, torch.tensor(mean), 0.5 / torch.tensor(std))


def test_the_real_autoencoder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(**{key: CONFIG[key] for key in CONFIG if not key.startswith("_")}).eval()
    network.save_pretrained(tmp_path)
    section = section_of(tmp_path)
    assert list(vision_faults(section)) == []
    assert num_elements(section) == sum(parameter.numel() for parameter in network.parameters())
    check_round_trip(
        section,
        lambda pixels: network.encode(pixels).latent_dist.mean,
        lambda latents: network.decode(latents).sample,
        torch.full((4,), 0.25),
        torch.full((4,), 0.5),
    )
    state = load_file(tmp_path / WEIGHTS)
    state.pop("decoder.conv_in.bias")
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="1 missing keys, such as decoder.conv_in.bias"):
        VisionTokenizer(section, "cpu")


@pytest.mark.usefixtures("diffusers")
def test_weights_that_are_not_of_the_configuration(tmp_path):
    section = write_folder(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file(state | {"quant_conv.bias": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="1 unexpected keys, such as quant_conv.bias; fetch both again"):
        VisionTokenizer(section, "cpu")
    save_file(state | {"encoder.bias": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: diffusers cannot load it .*config.json beside it"):
        VisionTokenizer(section, "cpu")


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    section = write_folder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"vision.latents = 'continuous': .*`pip install 'bitdance_scale\[latents\]'`"
    ):
        VisionTokenizer(section, "cpu")
    # What only looks at the files needs no package.
    assert list(vision_faults(section)) == [] and len(vision_digest(section)) == 32
    assert num_elements(section) == (3 + 3) * 4 * 2 * 2 + 4 + 3


def test_files_are_checked_before_any_rank_starts(tmp_path):
    section = write_folder(tmp_path)

    def faults(**changes: object) -> list[str]:
        return "\n".join(vision_faults(dataclasses.replace(section, **changes))).splitlines()

    (fault,) = faults(num_bits=16)
    assert "vision.num_bits = 16" in fault and "config.json has 4 (latent_channels)" in fault
    (fault,) = faults(channel_mult=(1, 2, 4))
    assert "vision.channel_mult = [1, 2, 4]" in fault and "has [16, 32]" in fault
    (fault,) = faults(num_res_blocks=2)
    assert "has 1 (layers_per_block)" in fault
    write_folder(tmp_path, latents_std=[1.0])
    assert "latents_std = [1.0]: must be a number for each" in faults()[0]
    write_folder(tmp_path, _class_name="AutoencoderDC")
    assert "_class_name = 'AutoencoderDC': must be 'AutoencoderKL'" in faults()[0]
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in faults()[0]
    # A pickle is no reason to read it.
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    assert f"has no {WEIGHTS}" in faults()[0] and "safe_serialization=True" in faults()[0]


def test_digests_follow_weights_and_scaling_but_not_the_writer(tmp_path):
    section = write_folder(tmp_path)
    data = load_config(CONFIGS / "demo.toml").data
    digest, recipe_before = vision_digest(section), recipe(data, section)
    assert recipe_before["latents"] == "continuous" and recipe_before["num_bits"] == 4
    write_folder(tmp_path, _diffusers_version="0.42.0")
    assert vision_digest(section) == digest
    write_folder(tmp_path, scaling_factor=1.0)
    assert vision_digest(section) != digest and recipe(data, section) != recipe_before
    write_folder(tmp_path)
    assert vision_digest(section) == digest and recipe(data, section) == recipe_before
    state = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / WEIGHTS)
    assert vision_digest(section) != digest and recipe(data, section) != recipe_before
