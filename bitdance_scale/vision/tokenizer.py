"""Pixels to packed bits, or to continuous latents as bytes, and back, with the frozen autoencoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.config.vae_files import read_vae_config, tokenizer_weights_file
from bitdance_scale.errors import CheckpointError, DataError
from bitdance_scale.float32_products import float32_products
from bitdance_scale.sequence.layout import block_raster_cells
from bitdance_scale.vision.autoencoder import PUBLISHED_NORM_GROUPS, Autoencoder, published_sizes
from bitdance_scale.vision.codes import agree, code_bytes, pack_codes, unpack_codes
from bitdance_scale.vision.latents import LatentAutoencoder, num_vae_elements
from bitdance_scale.vision.weights import check_weights, config_beside, load_weights, weights_digest
from bitdance_scale.weight_files import read_json

# Those that decide the bits, beside the weights. The decoder's kind shows in the shapes of the weights.
_DECISIVE_SIZES = ("num_bits", "channels", "channel_mult", "num_res_blocks")
_SIZES = (*_DECISIVE_SIZES, "norm_groups", "gan_decoder")

UNDRAWN_GREY = 128
"""The colour of cells that have no token yet."""


def autoencoder_sizes(section: VisionSection) -> dict[str, Any]:
    """The sizes of a section's autoencoder, by the names of `Autoencoder`'s arguments."""
    return {name: getattr(section, name) for name in _SIZES}


def make_autoencoder(section: VisionSection) -> Autoencoder:
    """An autoencoder with a section's sizes, without its weights."""
    return Autoencoder(**autoencoder_sizes(section))


def vision_digest(section: VisionSection) -> str:
    """Hexadecimal digest of all that decides the bits of an image but `block_side`: the weights and the sizes.

    `block_side` is left out because distillation changes it: it orders the bits and leaves them as they are.

    Raises:
        ConfigError: the weights file is missing; or the folder of a VAE is, or has other sizes.
        CheckpointError: it is damaged, or does not match the sizes of the section.
    """
    if section.latents == "bits":
        with torch.device("meta"):
            check_weights(section.weights_path, make_autoencoder(section).state_dict())
        _check_norm_groups(section)
        sizes: dict[str, Any] = {name: getattr(section, name) for name in _DECISIVE_SIZES}
        # Digests of networks with the published number do not know of it.
        if section.norm_groups != PUBLISHED_NORM_GROUPS:
            sizes["norm_groups"] = section.norm_groups
    else:
        config = read_vae_config(section)
        # Keys with an underscore say who wrote it.
        sizes = {"latents": section.latents} | {name: config[name] for name in config if not name.startswith("_")}
    decisive = sizes | {"weights": weights_digest(tokenizer_weights_file(section))}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def _check_norm_groups(section: VisionSection) -> None:
    """Compares the one size that no tensor shows with the configuration beside the weights, where there is one.

    Raises:
        CheckpointError: they differ.
    """
    config = config_beside(section.weights_path)
    if not config.is_file():
        return
    found = published_sizes(read_json(config), str(config))["norm_groups"]
    if found != section.norm_groups:
        raise CheckpointError(
            f"{config}: the group norms of these weights have {found} groups, but vision.norm_groups = "
            f"{section.norm_groups}; set it to {found}"
        )


def num_elements(section: VisionSection) -> int:
    """Elements of all weights of a section's autoencoder; of a VAE, its file is read."""
    if section.latents != "bits":
        return num_vae_elements(section)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_autoencoder(section).parameters())


def _load_autoencoder(section: VisionSection, dtype: torch.dtype) -> Autoencoder | LatentAutoencoder:
    if section.latents != "bits":
        return LatentAutoencoder(section).to(dtype)
    with torch.device("meta"):
        autoencoder = make_autoencoder(section)
    weights = load_weights(section.weights_path, autoencoder.state_dict())
    _check_norm_groups(section)
    autoencoder.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return autoencoder


class VisionTokenizer:
    """The autoencoder of a run, loaded and frozen: uint8 images to codes, in the order of `vision.order`, and back.

    A code is the bits of a token, or its continuous latents, as bytes (`codes.py`). What is said of bits below is true
    of continuous latents too, but that these depend on the batch by rounding.

    Args:
        section: sizes and weights file of the autoencoder, and the block side.
        device: where it runs.
        max_batch_px: images of one size are encoded together up to this many pixels (at least one image).
        dtype: dtype of the computation; training and stored bits use float32.

    Raises:
        ConfigError: the weights file is missing.
        CheckpointError: it is damaged, or does not match the sizes of the section.
    """

    def __init__(
        self,
        section: VisionSection,
        device: torch.device | str,
        max_batch_px: int = 1 << 20,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.section = section
        self.device, self.dtype = torch.device(device), dtype
        self.max_batch_px = max_batch_px
        self.autoencoder = _load_autoencoder(section, dtype)
        self.autoencoder.to(self.device).eval().requires_grad_(False)

    def encode(self, images: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Bits of each image; images of one size go through the network together.

        Args:
            images: uint8 [H, W, 3] each, sides divisible by downsample * block_side.

        Returns:
            One uint8 [h * w, code bytes] per image, in the order of `vision.order`: block raster,
            `(h p1) (w p2) c -> (h w p1 p2) c`, or raster.

        Raises:
            DataError: an image has another dtype or shape.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(self._checked_size(i, image), []).append(i)
        results: dict[int, np.ndarray] = {}
        for (height, width), members in groups.items():
            batch_size = max(1, self.max_batch_px // (height * width))
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                packed = self._encode_batch(torch.stack([images[i] for i in batch]))
                results.update(zip(batch, packed, strict=True))
        return [results[i] for i in range(len(images))]

    @torch.no_grad()
    def decode(self, bits: np.ndarray | torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The image of one token grid.

        Args:
            bits: in the same order; packed uint8 [h * w, code bytes], or a floating tensor [h * w, C], of bits -1 or
                +1.
            grid: (h, w) in latent cells.

        Returns:
            uint8 [H, W, 3] on the CPU, 127.5 x + 128 clipped to bytes (published release).

        Raises:
            ValueError: the bits do not match the grid.
        """
        tokens, kind = torch.as_tensor(bits), self.section.latents
        is_packed, num_values, (height, width) = tokens.dtype == torch.uint8, self.section.num_bits, grid
        if tokens.shape != (height * width, code_bytes(num_values, kind) if is_packed else num_values):
            raise ValueError(f"bits of shape {tuple(bits.shape)} are not {num_values} bits per cell of grid {grid}")
        tokens = unpack_codes(tokens, kind) if is_packed else tokens.float()
        p = self.section.order_side
        latents = rearrange(tokens, "(h w p1 p2) c -> 1 c (h p1) (w p2)", h=height // p, w=width // p, p1=p, p2=p)
        with float32_products(self.section.precision):
            pixels = self.autoencoder.decode(latents.to(self.device, self.dtype)).float()
        return rearrange((127.5 * pixels + 128).clamp(0, 255).to(torch.uint8), "1 c h w -> h w c").cpu()

    def decode_first(self, bits: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The image of a grid of which only the first tokens are drawn; cells without a token are `UNDRAWN_GREY`.

        The autoencoder sees zeros there, half-way between the two values of a bit, so that cells at the border of what
        is drawn may change when their neighbours come.

        Args:
            bits: floating [n, C], the first n of h * w tokens, in the order of `vision.order`.
            grid: (h, w) in latent cells.

        Returns:
            uint8 [H, W, 3] on the CPU.

        Raises:
            ValueError: there are more bits than cells.
        """
        num_cells, num_drawn = grid[0] * grid[1], len(bits)
        if num_drawn > num_cells:
            raise ValueError(f"bits of {num_drawn} cells do not fit into grid {grid}")
        image = self.decode(torch.cat([bits, bits.new_zeros(num_cells - num_drawn, bits.shape[1])]), grid)
        is_drawn = torch.zeros(grid, dtype=torch.bool)
        drawn_cells = torch.from_numpy(block_raster_cells(grid, self.section.order_side)[:num_drawn]).long()
        is_drawn[drawn_cells[:, 0], drawn_cells[:, 1]] = True
        side = self.section.downsample
        is_drawn_px = is_drawn.repeat_interleave(side, 0).repeat_interleave(side, 1)
        return torch.where(is_drawn_px[..., None], image, torch.tensor(UNDRAWN_GREY, dtype=torch.uint8))

    def is_of(self, code: bytes, image: torch.Tensor) -> bool:
        """Whether a code is of an image, which is encoded once more, alone, up to rounding (`codes.agree`).

        Raises:
            DataError: the image has another dtype or shape than `encode` takes.
        """
        self._checked_size(0, image)
        values = self._rows(image[None], self.autoencoder.latents)[0].float().cpu().numpy()
        return agree(code, values, self.section.latents, self.section.precision)

    def _encode_batch(self, images: torch.Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3] to codes, uint8 [N, h * w, code bytes]."""
        return pack_codes(self._rows(images, self.autoencoder.encode), self.section.latents).cpu().numpy()

    @torch.no_grad()
    def _rows(self, images: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """uint8 [N, H, W, 3] to what `encode` makes of their pixels, [N, h * w, C] in the order of `vision.order`."""
        pixels = rearrange(images.to(self.device), "n h w c -> n c h w").float() / 127.5 - 1
        p = self.section.order_side
        with float32_products(self.section.precision):
            values = encode(pixels.to(self.dtype).contiguous())
        return rearrange(values, "n c (h p1) (w p2) -> n (h w p1 p2) c", p1=p, p2=p)

    def _checked_size(self, i: int, image: torch.Tensor) -> tuple[int, int]:
        multiple = self.section.downsample * self.section.block_side
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"image {i}: {image.dtype} {tuple(image.shape)}, expected uint8 [height, width, 3]")
        height, width = image.shape[:2]
        if not height or not width or height % multiple or width % multiple:
            raise DataError(
                f"image {i}: {height} x {width} px; both sides must be positive multiples of {multiple} px "
                "(vision.downsample * vision.block_side); crop or resize the image to such a size"
            )
        return height, width
