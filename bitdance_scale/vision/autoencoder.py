"""The convolutional autoencoder of the binary visual tokenizer, as published.

Parameter names equal the published tensor names, so weights pass both ways unchanged. The names leave some questions
open, which are settled here as follows:

- levels count from 0, the finest; `decoder.up` and `decoder.adaptive` are indexed by level, although the decoder runs
  from the deepest level to 0;
- level l of the encoder has `channels * channel_mult[l]` channels; its first residual block changes the width from that
  of level l - 1 (level 0: from `channels`), and has `nin_shortcut`, a 1x1 convolution without bias, if the two differ;
  `mid_block` keeps the deepest width, and like every level has `num_res_blocks` residual blocks;
- `encoder.conv_in` and `decoder.conv_in` are 3x3 convolutions, the first without a bias, the second with one; so are
  `downsample` and `upsample.conv1`, both with a bias and both keeping the width of their level (`upsample.conv1` makes
  four times as many channels, which depth-to-space folds into pixels);
- `norm_out` and the norms of the residual blocks are affine and followed by SiLU; `adaptive` is not;
- `decoder.adaptive.{level}` works on the width that enters the level; gamma and beta are linears from the bits'
  channels;
- `encoder.conv_out` (1x1) and `decoder.conv_out` (3x3) have biases.

The published sizes (channels 256, multipliers 1, 1, 2, 2, 4, 4 residual blocks, 32 bits) give 460 M parameters. Shapes:
N images, C bits per token, H x W pixels, h x w = H/f x W/f latent cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitdance_scale.errors import CheckpointError
from bitdance_scale.vision.bits import sign_bits
from bitdance_scale.wording import first_few

PUBLISHED_NORM_GROUPS = 32
NORM_EPS = 1e-6
# Of the release's encoder and decoder; they do not use `resolution`.
_PUBLISHED_DEFAULTS: Mapping[str, object] = {
    "ch_mult": (1, 2, 2, 4),
    "double_z": False,
    "resolution": None,
    "norm_groups": PUBLISHED_NORM_GROUPS,
}


class Autoencoder(nn.Module):
    """Images in [-1, 1] to latents, whose signs are the bits, and bits to images (arXiv 2602.14041 Sec. 3.1).

    Args:
        num_bits: C, bits per token.
        channels: base width.
        channel_mult: multiplier of the width per level; the downsampling factor is 2^(levels - 1).
        num_res_blocks: residual blocks per level and in the middle.
        norm_groups: groups of the group norms, which divide every width; 32 in all published ones.
        gan_decoder: whether the decoder also takes noise, so that it can make up detail that the bits do not hold.
    """

    def __init__(
        self,
        *,
        num_bits: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        norm_groups: int = PUBLISHED_NORM_GROUPS,
        gan_decoder: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        self.encoder = Encoder(num_bits, channels, widths, num_res_blocks, norm_groups)
        self.decoder = Decoder(num_bits, widths, num_res_blocks, norm_groups, takes_noise=gan_decoder)

    def recompute_blocks(self) -> None:
        """Has the backward pass compute residual blocks again instead of keeping what is within them."""
        for module in self.modules():
            if isinstance(module, ResidualBlocks):
                module.recomputes = True

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bits [N, C, h, w] in {-1, +1} of pixels [N, 3, H, W] in [-1, 1]; the downsampling divides H and W."""
        return sign_bits(self.latents(pixels))

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """The values [N, C, h, w] whose signs are the bits of pixels."""
        return self.encoder(pixels)

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """Pixels [N, 3, H, W], about [-1, 1] but not clipped, of bits [N, C, h, w]; h * w must be at least 2.

        A decoder that takes noise gets `decoder_noise`, so that bits are always decoded to the same image.
        """
        return self.decoder(bits, decoder_noise(bits) if self.decoder.takes_noise else None)


class Encoder(nn.Module):
    """Pixels [N, 3, H, W] to latents [N, C, h, w]."""

    def __init__(
        self, num_bits: int, channels: int, widths: Sequence[int], num_res_blocks: int, norm_groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        width = channels
        for level, next_width in enumerate(widths):
            is_last = level == len(widths) - 1
            self.down.append(EncoderLevel(width, next_width, num_res_blocks, norm_groups, is_last=is_last))
            width = next_width
        self.mid_block = ResidualBlocks(width, width, num_res_blocks, norm_groups)
        self.norm_out = nn.GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, num_bits, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] of pixels [N, 3, H, W]."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(hidden))))


class EncoderLevel(nn.Module):
    """Residual blocks, then on all levels but the last a convolution that halves height and width."""

    def __init__(self, in_width: int, out_width: int, num_res_blocks: int, norm_groups: int, *, is_last: bool) -> None:
        super().__init__()
        self.block = ResidualBlocks(in_width, out_width, num_res_blocks, norm_groups)
        self.is_last = is_last
        if not is_last:
            self.downsample = nn.Conv2d(out_width, out_width, 3, stride=2, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, out, h / 2, w / 2]; on the last level [N, out, h, w]."""
        hidden = self.block(hidden)
        return hidden if self.is_last else self.downsample(hidden)


class Decoder(nn.Module):
    """Bits [N, C, h, w] to pixels [N, 3, H, W]; the bits also modulate the input of every level.

    With `takes_noise` the first convolution sees the bits and then as many channels of noise; the modulation depends on
    the bits alone (published release, `gan_decoder`).
    """

    def __init__(
        self, num_bits: int, widths: Sequence[int], num_res_blocks: int, norm_groups: int, *, takes_noise: bool = False
    ) -> None:
        super().__init__()
        self.takes_noise = takes_noise
        self.conv_in = nn.Conv2d(2 * num_bits if takes_noise else num_bits, widths[-1], 3, padding=1)
        self.mid_block = ResidualBlocks(widths[-1], widths[-1], num_res_blocks, norm_groups)
        entry_widths = [*widths[1:], widths[-1]]
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(num_bits, width, norm_groups) for width in entry_widths)
        self.up = nn.ModuleList()
        for level, (entry_width, width) in enumerate(zip(entry_widths, widths, strict=True)):
            self.up.append(DecoderLevel(entry_width, width, num_res_blocks, norm_groups, is_last=level == 0))
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, bits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels [N, 3, H, W] of bits [N, C, h, w] and, with `takes_noise`, of noise N(0, 1) of the same shape."""
        assert (noise is not None) == self.takes_noise, "a decoder has noise if it takes noise"
        hidden = self.mid_block(self.conv_in(bits if noise is None else torch.cat([bits, noise], dim=1)))
        for level in reversed(range(len(self.up))):
            hidden = self.up[level](self.adaptive[level](hidden, bits))
        return self.conv_out(F.silu(self.norm_out(hidden)))


class DecoderLevel(nn.Module):
    """Residual blocks, then on all levels but the last (level 0) a doubling of height and width."""

    def __init__(self, in_width: int, out_width: int, num_res_blocks: int, norm_groups: int, *, is_last: bool) -> None:
        super().__init__()
        self.block = ResidualBlocks(in_width, out_width, num_res_blocks, norm_groups)
        self.is_last = is_last
        if not is_last:
            self.upsample = Upsample(out_width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, out, 2h, 2w]; on the last level [N, out, h, w]."""
        hidden = self.block(hidden)
        return hidden if self.is_last else self.upsample(hidden)


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution on x when the width changes."""

    def __init__(self, in_width: int, out_width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, out_width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.changes_width = in_width != out_width
        if self.changes_width:
            self.nin_shortcut = nn.Conv2d(in_width, out_width, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, out, h, w]."""
        change = self.conv1(F.silu(self.norm1(hidden)))
        change = self.conv2(F.silu(self.norm2(change)))
        return (self.nin_shortcut(hidden) if self.changes_width else hidden) + change


class ResidualBlocks(nn.ModuleList):
    """`num_blocks` residual blocks one after the other; the first one changes the width.

    Attributes:
        recomputes: whether the backward pass computes what is within a block again, instead of keeping it.
    """

    recomputes = False

    def __init__(self, in_width: int, out_width: int, num_blocks: int, norm_groups: int) -> None:
        super().__init__(
            ResidualBlock(in_width if i == 0 else out_width, out_width, norm_groups) for i in range(num_blocks)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, in, h, w] to [N, out, h, w]."""
        for block in self:
            if self.recomputes and torch.is_grad_enabled():
                # Nothing in a block is random.
                hidden = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden)
        return hidden


def decoder_noise(bits: torch.Tensor) -> torch.Tensor:
    """The noise that bits are decoded with, N(0, 1), in the shape, dtype and device of `bits` [N, C, h, w].

    The release draws other numbers at every decode. Here they are a function of the image's bits: the same bits are the
    same image in any batch, on any device and in any process, and an evaluation can be repeated.
    """
    rows = []
    for image in bits.detach().cpu():
        content = repr(tuple(image.shape)).encode() + np.packbits(image.float().numpy() > 0).tobytes()
        key = np.frombuffer(hashlib.sha256(content).digest()[:16], dtype="<u8")
        rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(image.shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).to(bits)


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and bias are linear in the standard deviation and the mean of the image's bits."""

    def __init__(self, num_bits: int, width: int, norm_groups: int = PUBLISHED_NORM_GROUPS) -> None:
        super().__init__()
        self._norm_groups = norm_groups
        self.gamma = nn.Linear(num_bits, width)
        self.beta = nn.Linear(num_bits, width)
        # Training starts from a plain group norm; the initialisation of the published weights is not known.
        nn.init.zeros_(self.gamma.weight)
        nn.init.ones_(self.gamma.bias)
        nn.init.zeros_(self.beta.weight)
        nn.init.zeros_(self.beta.bias)

    def forward(self, hidden: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Normalises `hidden` [N, D, h, w] given `bits` [N, C, h, w]; uses the unbiased variance over cells."""
        cells = rearrange(bits, "n c h w -> n c (h w)")
        scale = self.gamma((cells.var(dim=-1) + NORM_EPS).sqrt())
        bias = self.beta(cells.mean(dim=-1))
        normed = F.group_norm(hidden, self._norm_groups, eps=NORM_EPS)
        return torch.addcmul(bias[..., None, None], scale[..., None, None], normed)


class Upsample(nn.Module):
    """Doubles height and width: a 3x3 convolution to four times the channels, then depth-to-space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D, h, w] to [N, D, 2h, 2w]; the channels are ordered (block row, block column, channel), as published."""
        return rearrange(self.conv1(hidden), "n (p1 p2 d) h w -> n d (h p1) (w p2)", p1=2, p2=2)


def published_config(
    *,
    num_bits: int,
    channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int,
    norm_groups: int = PUBLISHED_NORM_GROUPS,
    gan_decoder: bool = False,
) -> dict[str, object]:
    """The sizes of an `Autoencoder` as the published `ae_config.json` states them.

    Another number of norm groups than theirs is a key of our own, which the release's code refuses.
    """
    own = {} if norm_groups == PUBLISHED_NORM_GROUPS else {"norm_groups": norm_groups}
    return {
        "ddconfig": {
            **own,
            "double_z": False,
            "z_channels": num_bits,
            "in_channels": 3,
            "out_ch": 3,
            "ch": channels,
            "ch_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
        },
        "gan_decoder": gan_decoder,
    }


def published_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments of `Autoencoder` in a published `ae_config.json`; the inverse of `published_config`.

    Keys that are missing take the defaults of the release's own classes.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: a size is missing or no number, or the network is not an `Autoencoder` (other image channels).
    """
    problems = [*_size_problems(config)]
    if problems:
        raise CheckpointError(f"{where}: {first_few(problems)}")
    sizes = {**_PUBLISHED_DEFAULTS, **config["ddconfig"]}
    return {
        "num_bits": sizes["z_channels"],
        "channels": sizes["ch"],
        "channel_mult": tuple(sizes["ch_mult"]),
        "num_res_blocks": sizes["num_res_blocks"],
        "norm_groups": sizes["norm_groups"],
        "gan_decoder": config.get("gan_decoder", False),
    }


def deduced_sizes(shapes: Mapping[str, Sequence[int]], where: str) -> dict[str, Any]:
    """The keyword arguments of the `Autoencoder` whose tensors have these shapes, as a pickle states no sizes.

    Args:
        shapes: published name -> shape; only those that show a size are looked at.
        where: the file, for messages.

    Raises:
        CheckpointError: one of these is missing, or no such network has shapes like them.
    """
    levels = {name.split(".")[2] for name in shapes if name.startswith("encoder.down.") and name.count(".") > 3}
    norms = [f"encoder.down.{level}.block.0.norm2.weight" for level in range(len(levels))]
    ranks = dict.fromkeys(norms, 1) | dict.fromkeys(
        ("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight"), 4
    )
    missing = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank or 0 in shapes[name]]
    if missing or not norms:
        raise CheckpointError(
            f"{where}: {first_few(missing or ['encoder.down.0'])} missing or of another shape; it is no published "
            "autoencoder (encoder.* and decoder.*)"
        )
    channels, num_bits = shapes["encoder.conv_in.weight"][0], shapes["encoder.conv_out.weight"][0]
    blocks = [name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.") and name.count(".") > 5]
    config = published_config(
        num_bits=num_bits,
        channels=channels,
        channel_mult=[shapes[name][0] // channels for name in norms],
        num_res_blocks=len(set(blocks)),
        gan_decoder=shapes["decoder.conv_in.weight"][1] == 2 * num_bits,
    )
    # It has the other rules on sizes: of groups, bytes and positive numbers.
    return published_sizes(config, where)


def _size_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(config.get("gan_decoder", False), bool):
        yield f"gan_decoder = {config['gan_decoder']!r}: must be true or false"
    stated = config.get("ddconfig")
    if not isinstance(stated, Mapping):
        yield f"ddconfig = {stated!r}: must be an object with the sizes of the network"
        return
    sizes = {**_PUBLISHED_DEFAULTS, **stated}
    wanted = {"double_z": False, "in_channels": 3, "out_ch": 3}
    for key, value in wanted.items():
        if sizes.get(key) != value:
            yield f"ddconfig.{key} = {sizes.get(key)!r}: must be {json.dumps(value)}, as for images in RGB and signs"
    multipliers = sizes["ch_mult"]
    numbers = {key: sizes.get(key) for key in ("z_channels", "ch", "num_res_blocks", "norm_groups")}
    if not isinstance(multipliers, list | tuple) or not multipliers:
        yield f"ddconfig.ch_mult = {multipliers!r}: must be a list, a multiplier of the width for each level"
    else:
        numbers |= {f"ch_mult[{level}]": multiplier for level, multiplier in enumerate(multipliers)}
    for key, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            yield f"ddconfig.{key} = {number!r}: must be a positive integer"
    groups = numbers["norm_groups"]
    if isinstance(numbers["ch"], int) and isinstance(groups, int) and groups > 0 and numbers["ch"] % groups:
        yield f"ddconfig.ch = {numbers['ch']}: must be a multiple of {groups}, the groups of the norms"
    if isinstance(numbers["z_channels"], int) and numbers["z_channels"] % 8:
        yield f"ddconfig.z_channels = {numbers['z_channels']}: must be a multiple of 8, as bits fill whole bytes"
    yield from (
        f"ddconfig.{key}: unknown to this program"
        for key in sorted({*stated} - {*wanted, *_PUBLISHED_DEFAULTS, "z_channels", "ch", "num_res_blocks"})
    )
