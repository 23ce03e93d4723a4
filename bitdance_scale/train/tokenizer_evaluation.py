"""How well a tokenizer reconstructs held-out images, and how well it uses its bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange

from bitdance_scale.evaluation.pixels import psnr_db, ssim
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.quantiser import code_usage

BATCH_PX = 1 << 18
FLIPPED_SHARE = 0.01


@dataclass(frozen=True)
class Reconstruction:
    """Result at one image size.

    Attributes:
        psnr_db: mean over images of the PSNR of the decoded bytes, in dB.
        psnr_flipped_db: the same when one bit in a hundred is flipped before decoding.
        ssim: mean over images of their structural similarity (`evaluation/pixels.py`).
        bit_balance: share of +1 of every bit, float64 [C].
        code_share: share of the codes of a group that occur at all, mean over groups.
        code_entropy_bits: entropy of the codes of a group, mean over groups; at most the bits of a group.
        decoded: uint8 [n, H, W, 3].
    """

    psnr_db: float
    psnr_flipped_db: float
    ssim: float
    bit_balance: np.ndarray
    code_share: float
    code_entropy_bits: float
    decoded: np.ndarray


def evaluate(autoencoder: Autoencoder, images: np.ndarray, num_groups: int, device: torch.device) -> Reconstruction:
    """Encodes and decodes images of one size in float32.

    Args:
        autoencoder: on `device`; its mode is left alone, as it has no layer that depends on it.
        images: uint8 [n, H, W, 3].
        num_groups: groups of bits whose codes are counted.
        device: where to compute.
    """
    batch_size = max(1, BATCH_PX // (images.shape[1] * images.shape[2]))
    decoded, decoded_flipped, all_bits = [], [], []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = decode_batch(autoencoder, part, range(start, start + len(part)), device)
        decoded.append(batch.decoded)
        decoded_flipped.append(batch.decoded_flipped)
        all_bits.append(batch.tokens)
    tokens = torch.cat(all_bits)
    usage = code_usage(tokens, num_groups).double()
    return Reconstruction(
        psnr_db=float(psnr_db(np.concatenate(decoded), images).mean()),
        psnr_flipped_db=float(psnr_db(np.concatenate(decoded_flipped), images).mean()),
        ssim=float(ssim(np.concatenate(decoded), images).mean()),
        bit_balance=(tokens > 0).double().mean(dim=0).numpy(),
        code_share=float((usage > 0).double().mean()),
        code_entropy_bits=float(torch.special.entr(usage).sum(dim=-1).mean() / np.log(2)),
        decoded=np.concatenate(decoded),
    )


@dataclass(frozen=True)
class DecodedBatch:
    """Images of one size as the bits give them back.

    Attributes:
        decoded: uint8 [n, H, W, 3].
        decoded_flipped: the same with one bit in a hundred flipped.
        tokens: bits of all tokens, image by image in raster order, float32 [n h w, C] on the CPU.
    """

    decoded: np.ndarray
    decoded_flipped: np.ndarray
    tokens: torch.Tensor


@torch.no_grad()
def decode_batch(
    autoencoder: Autoencoder, images: np.ndarray, samples: Sequence[int], device: torch.device
) -> DecodedBatch:
    """Encodes and decodes images in float32.

    Args:
        autoencoder: on `device`.
        images: uint8 [n, H, W, 3]; the downsampling divides H and W.
        samples: number of each image, which decides the bits that are flipped.
        device: where to compute.
    """
    bits = autoencoder.encode(to_pixels(images, device))
    is_flipped = torch.stack([_flips(sample, bits.shape[1:]) for sample in samples]).to(device)
    return DecodedBatch(
        to_bytes(autoencoder.decode(bits)),
        to_bytes(autoencoder.decode(torch.where(is_flipped, -bits, bits))),
        rearrange(bits, "n c h w -> (n h w) c").cpu(),
    )


def _flips(sample: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sample)) < FLIPPED_SHARE


def to_pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """float32 [n, 3, H, W] in [-1, 1] of uint8 images [n, H, W, 3]: x / 127.5 - 1."""
    tensor = rearrange(torch.from_numpy(images).to(device), "n h w c -> n c h w")
    return (tensor.float() / 127.5 - 1).contiguous()


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3] of pixels [n, 3, H, W]: 127.5 x + 128, clipped (release)."""
    return rearrange((127.5 * pixels + 128).clamp(0, 255).to(torch.uint8), "n c h w -> n h w c").cpu().numpy()


def summary(results: Mapping[tuple[int, int], Reconstruction]) -> str:
    """A markdown table, one row per (height, width)."""
    lines = [
        "| size (px) | PSNR (dB) | PSNR, 1% flipped (dB) | SSIM | codes used | code entropy (bits) | +1 per bit |",
        "|---|---|---|---|---|---|---|",
    ]
    for (height, width), result in results.items():
        balance = f"{result.bit_balance.min():.2f}..{result.bit_balance.max():.2f}"
        lines.append(
            f"| {height} x {width} | {result.psnr_db:.2f} | {result.psnr_flipped_db:.2f} | {result.ssim:.3f} | "
            f"{result.code_share:.1%} | {result.code_entropy_bits:.2f} | {balance} |"
        )
    return "\n".join(lines)
