"""The folder of an AutoencoderKL, as diffusers writes it: `config.json` and weights in safetensors.

It takes the place of the binary autoencoder where `vision.latents` is continuous, and is checked against the sizes of
the section before any rank starts. Weights in another format are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.errors import ConfigError

VAE_CLASS = "AutoencoderKL"
VAE_CONFIG_NAME, VAE_WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"


def vae_config_file(section: VisionSection) -> Path:
    """Where the sizes of its AutoencoderKL are."""
    return section.weights_path / VAE_CONFIG_NAME


def tokenizer_weights_file(section: VisionSection) -> Path:
    """The safetensors file with the weights that decide the codes, of either kind of latents."""
    return section.weights_path if section.latents == "bits" else section.weights_path / VAE_WEIGHTS_NAME


def read_vae_config(section: VisionSection) -> dict[str, Any]:
    """`config.json` of the folder that `vision.weights` names, which agrees with the section.

    Raises:
        ConfigError: a file is missing or is no such configuration, or has other sizes; lists all that is wrong.
    """
    config = _parsed(section)
    faults = [*_size_faults(config, section)]
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def _parsed(section: VisionSection) -> dict[str, Any]:
    named = f"vision.weights = {str(section.weights_path)!r}"
    wanted = f"a folder with {VAE_CONFIG_NAME} and {VAE_WEIGHTS_NAME} of an {VAE_CLASS} (vision.latents = 'continuous')"
    for path in (vae_config_file(section), tokenizer_weights_file(section)):
        if not path.is_file():
            raise ConfigError(
                f"{named}: has no {path.name}; set it to {wanted}. Other formats of weights are not read: save it with "
                "diffusers' save_pretrained(FOLDER, safe_serialization=True)"
            )
    path = vae_config_file(section)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != VAE_CLASS:
        raise ConfigError(f"{path}: _class_name = {found!r}: must be {VAE_CLASS!r}; set vision.weights to {wanted}")
    return config


def _size_faults(config: dict[str, Any], section: VisionSection) -> Iterator[str]:
    """Sizes of the section that are not those of the AutoencoderKL."""
    path = vae_config_file(section)
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        yield f"{path}: block_out_channels = {widths!r}: must be a list of channels per level; fetch it again"
        return
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != config.get("latent_channels")):
            yield f"{path}: {name} = {values!r}: must be a number for each of latent_channels, or null; fetch it again"
    expected = {
        "num_bits": (section.num_bits, config.get("latent_channels"), "latent_channels"),
        "channels": (section.channels, widths[0], "block_out_channels[0]"),
        "channel_mult": (
            [section.channels * multiplier for multiplier in section.channel_mult],
            widths,
            "block_out_channels, each over vision.channels",
        ),
        "num_res_blocks": (section.num_res_blocks, config.get("layers_per_block"), "layers_per_block"),
    }
    for name, (ours, theirs, source) in expected.items():
        if ours == theirs:
            continue
        value = getattr(section, name)
        shown = list(value) if isinstance(value, tuple) else value
        yield (
            f"vision.{name} = {shown}: {path} has {theirs} ({source}); set vision.{name} as there (downsampling is "
            "2^(levels - 1))"
        )
