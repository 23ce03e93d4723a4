"""Continuous latents of an AutoencoderKL in place of bits (the ablation of arXiv 2602.14041 Table 12).

This is the only file that imports diffusers, which is an optional dependency. The network is diffusers' own; only
weights in safetensors are read, from a local folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.config.vae_files import read_vae_config, tokenizer_weights_file
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.weight_files import read_single_header


class LatentAutoencoder(nn.Module):
    """Pixels to scaled latents and back, with the methods of the binary `Autoencoder`.

    The latents of an image are the mean of its distribution, not a draw from it, so that an image has one code:
    `scale (mean - shift)`, with `scaling_factor` and `shift_factor` of its configuration, or with its `latents_mean`
    and `latents_std` per channel where it has them, as diffusers' pipelines compute them.

    Args:
        section: names the folder; its sizes have been compared with it.

    Raises:
        ConfigError: diffusers is not installed, or the folder is missing, incomplete or has other sizes.
        CheckpointError: the weights are damaged, or are not those of the configuration.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, section: VisionSection) -> None:
        super().__init__()
        read_vae_config(section)
        self.network = _load(section)
        scale, shift = _affine(self.network.config, section.num_bits)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`latents`, which nothing quantises."""
        return self.latents(pixels)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, C, h, w] of pixels [N, 3, H, W] in [-1, 1]."""
        return (self.network.encode(pixels).latent_dist.mode() - self.shift) * self.scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [N, 3, H, W], about [-1, 1], of scaled latents [N, C, h, w]."""
        return self.network.decode(latents / self.scale + self.shift).sample


def num_vae_elements(section: VisionSection) -> int:
    """Elements of all weights of the AutoencoderKL, as its file says; needs no diffusers.

    Raises:
        ConfigError: the folder is missing, incomplete or has other sizes.
        CheckpointError: the weights are damaged.
    """
    read_vae_config(section)
    specs = read_single_header(tokenizer_weights_file(section)).values()
    return sum(torch.Size(spec.shape).numel() for spec in specs)


# Any: diffusers has no types that can be relied on, and may be absent.
def _load(section: VisionSection) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            f"vision.latents = 'continuous': the package diffusers cannot be imported ({error}); install it with "
            "`pip install 'bitdance_scale[latents]'`, or set vision.latents=bits"
        ) from error
    path = tokenizer_weights_file(section)
    # First, because it tells damage from other faults.
    read_single_header(path)
    try:
        # It also renames the attention of files of early versions.
        network, report = AutoencoderKL.from_pretrained(
            str(section.weights_path),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: diffusers cannot load it ({' '.join(str(error).split())}); it must hold the weights of "
            "config.json beside it"
        ) from error
    wrong = {kind: sorted(map(str, report.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys")}
    found = [f"{len(names)} {kind.replace('_', ' ')}, such as {names[0]}" for kind, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{path}: not the weights of config.json beside it: {'; '.join(found)}; fetch both again")
    return network


def _affine(config: Any, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), float32 [C, 1, 1] each; `config` is what the network was made with, defaults included."""

    def per_channel(value: Any) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float32).flatten().expand(num_channels)[:, None, None].clone()

    scale = per_channel(config["scaling_factor"])
    if config.get("latents_std") is not None:
        scale = scale / per_channel(config["latents_std"])
    mean = config.get("latents_mean")
    return scale, per_channel(mean if mean is not None else config.get("shift_factor") or 0.0)
