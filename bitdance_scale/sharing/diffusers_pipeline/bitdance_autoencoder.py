"""BitDance's binary autoencoder: images to bits, and bits to images (arXiv 2602.14041 Sec. 3.1).

Written for the diffusers library; licensed under Apache-2.0, as the project bitdance_scale that it comes from.

Shapes: N images, C bits per token, H x W pixels, h x w cells.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional

NORM_EPS = 1e-6
CHANNEL_MULT, NORM_GROUPS = (1, 2, 2, 4), 32


class BitDanceAutoencoder(ModelMixin, ConfigMixin):
    """Pixels in [-1, 1] to bits, and back.

    Args:
        ddconfig: sizes by their published names: z_channels (C), ch, ch_mult, num_res_blocks; norm_groups where it is
            not 32.
        gan_decoder: whether the decoder also takes noise.
    """

    @register_to_config
    def __init__(self, ddconfig: dict[str, Any], gan_decoder: bool = False) -> None:
        super().__init__()
        num_bits, channels, num_blocks = (ddconfig[name] for name in ("z_channels", "ch", "num_res_blocks"))
        widths = [channels * factor for factor in ddconfig.get("ch_mult", CHANNEL_MULT)]
        groups = ddconfig.get("norm_groups", NORM_GROUPS)
        self.num_bits, self.downsample = num_bits, 2 ** (len(widths) - 1)
        self.encoder = Encoder(num_bits, channels, widths, num_blocks, groups)
        self.decoder = Decoder(num_bits, widths, num_blocks, groups, gan_decoder)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bits [N, C, h, w], -1 and 1, of pixels [N, 3, H, W] whose sides `downsample` divides."""
        return torch.where(self.encoder(pixels) > 0, 1.0, -1.0).to(pixels.dtype)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """Pixels [N, 3, H, W], not clipped, of bits [N, C, h, w]; the same for the same bits."""
        pixels: torch.Tensor = self.decoder(bits, decoder_noise(bits) if self.decoder.takes_noise else None)
        return pixels

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is left of pixels [N, 3, H, W] after bits."""
        return self.decode(self.encode(pixels))


def decoder_noise(bits: torch.Tensor) -> torch.Tensor:
    """N(0, 1) in the shape of bits [N, C, h, w], a function of each image's bits: no image depends on its batch."""
    rows = []
    for image in bits.detach().cpu():
        content = repr(tuple(image.shape)).encode() + np.packbits(image.float().numpy() > 0).tobytes()
        key = np.frombuffer(hashlib.sha256(content).digest()[:16], dtype="<u8")
        rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(image.shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).to(bits)


class Encoder(nn.Module):
    """Pixels [N, 3, H, W] to the values [N, C, h, w] whose signs are the bits."""

    def __init__(self, num_bits: int, channels: int, widths: Sequence[int], num_blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        in_widths = [channels, *widths[:-1]]
        self.down = nn.ModuleList(
            EncoderLevel(in_width, width, num_blocks, groups, is_last=level == len(widths) - 1)
            for level, (in_width, width) in enumerate(zip(in_widths, widths, strict=True))
        )
        self.mid_block = residual_blocks(widths[-1], widths[-1], num_blocks, groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], num_bits, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As above."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        latents: torch.Tensor = self.conv_out(functional.silu(self.norm_out(self.mid_block(hidden))))
        return latents


class EncoderLevel(nn.Module):
    """Residual blocks, then on all levels but the last a convolution that halves height and width."""

    def __init__(self, in_width: int, width: int, num_blocks: int, groups: int, *, is_last: bool) -> None:
        super().__init__()
        self.block = residual_blocks(in_width, width, num_blocks, groups)
        self.is_last = is_last
        if not is_last:
            self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, width, h / 2, w / 2], or to the same height and width."""
        hidden = self.block(hidden)
        return hidden if self.is_last else self.downsample(hidden)


class Decoder(nn.Module):
    """Bits [N, C, h, w] to pixels; the bits also modulate the input of every level. Levels count from the finest."""

    def __init__(self, num_bits: int, widths: Sequence[int], num_blocks: int, groups: int, takes_noise: bool) -> None:
        super().__init__()
        self.takes_noise = takes_noise
        self.conv_in = nn.Conv2d(2 * num_bits if takes_noise else num_bits, widths[-1], 3, padding=1)
        self.mid_block = residual_blocks(widths[-1], widths[-1], num_blocks, groups)
        entries = [*widths[1:], widths[-1]]
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(num_bits, width, groups) for width in entries)
        self.up = nn.ModuleList(
            DecoderLevel(entry, width, num_blocks, groups, is_last=level == 0)
            for level, (entry, width) in enumerate(zip(entries, widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, bits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """As above; with `takes_noise`, `noise` is N(0, 1) in the shape of the bits."""
        hidden = self.mid_block(self.conv_in(bits if noise is None else torch.cat([bits, noise], dim=1)))
        for level in reversed(range(len(self.up))):
            hidden = self.up[level](self.adaptive[level](hidden, bits))
        pixels: torch.Tensor = self.conv_out(functional.silu(self.norm_out(hidden)))
        return pixels


class DecoderLevel(nn.Module):
    """Residual blocks, then on all levels but the finest a doubling of height and width."""

    def __init__(self, in_width: int, width: int, num_blocks: int, groups: int, *, is_last: bool) -> None:
        super().__init__()
        self.block = residual_blocks(in_width, width, num_blocks, groups)
        self.is_last = is_last
        if not is_last:
            self.upsample = Upsample(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, width, 2h, 2w], or to the same height and width."""
        hidden = self.block(hidden)
        return hidden if self.is_last else self.upsample(hidden)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, beside the input, which is widened by a 1x1 where it must be."""

    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.changes_width = in_width != width
        if self.changes_width:
            self.nin_shortcut = nn.Conv2d(in_width, width, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, width, h, w]."""
        change = self.conv1(functional.silu(self.norm1(hidden)))
        change = self.conv2(functional.silu(self.norm2(change)))
        total: torch.Tensor = (self.nin_shortcut(hidden) if self.changes_width else hidden) + change
        return total


def residual_blocks(in_width: int, width: int, num_blocks: int, groups: int) -> nn.Sequential:
    """Residual blocks one after the other; the first one changes the width."""
    return nn.Sequential(*(ResidualBlock(width if i else in_width, width, groups) for i in range(num_blocks)))


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and bias are linear in the standard deviation and the mean of the image's bits."""

    def __init__(self, num_bits: int, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.gamma = nn.Linear(num_bits, width)
        self.beta = nn.Linear(num_bits, width)

    def forward(self, hidden: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """[N, D, h, w] given bits [N, C, h, w]; the variance over cells is the unbiased one."""
        cells = bits.flatten(2)
        scale = self.gamma((cells.var(dim=-1) + NORM_EPS).sqrt())
        bias = self.beta(cells.mean(dim=-1))
        normed = functional.group_norm(hidden, self.groups, eps=NORM_EPS)
        return torch.addcmul(bias[..., None, None], scale[..., None, None], normed)


class Upsample(nn.Module):
    """Doubles height and width: a 3x3 convolution to four times the channels, then depth-to-space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D, h, w] to [N, D, 2h, 2w]; the channels are ordered (block row, block column, channel)."""
        parts = self.conv1(hidden).unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)
        folded: torch.Tensor = parts.flatten(4, 5).flatten(2, 3)
        return folded
