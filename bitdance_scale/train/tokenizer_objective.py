"""What trains the binary visual tokenizer: the networks' outputs on a step's crops, and the losses on them.

Every loss is a mean over the global batch, of which a rank computes its part: its sum over its own images, divided by
the number of all ranks' images. Parts add up over the ranks, as do their gradients, however the images are shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from bitdance_scale.config.tokenizer_schema import QuantiserSection, TokenizerConfig
from bitdance_scale.parallel.replicated import ReplicatedNetwork, summed
from bitdance_scale.sequence.noise import Purpose, generator
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from bitdance_scale.vision.quantiser import entropy_loss, straight_through_sign

LOSSES = ("l1", "l2", "edge", "lpips", "adversarial", "entropy_token", "entropy_codebook", "commit")
ADVERSARIAL = "adversarial"
DISCRIMINATOR_LOSSES = ("hinge", "lecam")


@dataclass(frozen=True)
class Crops:
    """What a rank trains on in a step.

    Attributes:
        pixels: float32 [N, 3, H, W] in [-1, 1].
        slots: the number of each image within the step; with seed and step it decides the noise of the image.
        num_images: images of all ranks.
    """

    pixels: torch.Tensor
    slots: Sequence[int]
    num_images: int

    @property
    def part(self) -> float:
        """This rank's share of the images."""
        return len(self.pixels) / self.num_images


class Reconstructor(nn.Module):
    """The autoencoder's pass in training, as one module for a data-parallel wrapper.

    Args:
        autoencoder: its weights are float32.
        dtype: of the convolutions (autocast).
        trains_encoder: whether the encoder is trained too.
    """

    def __init__(self, autoencoder: Autoencoder, dtype: torch.dtype, *, trains_encoder: bool) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self._dtype, self._trains_encoder = dtype, trains_encoder
        autoencoder.encoder.requires_grad_(trains_encoder)

    def forward(
        self, pixels: torch.Tensor, is_flipped: torch.Tensor | None, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encodes, and decodes the signs with some of them flipped.

        Args:
            pixels: float32 [N, 3, H, W] in [-1, 1].
            is_flipped: bool [N, C, h, w]; None: no bit is.
            noise: float32 [N, C, h, w] of a decoder that takes noise, else None.

        Returns:
            Latents [N, C, h, w], their signs with straight-through gradients, and pixels [N, 3, H, W], all float32.
        """
        with torch.autocast(pixels.device.type, self._dtype, enabled=self._dtype != torch.float32):
            with torch.set_grad_enabled(self._trains_encoder and torch.is_grad_enabled()):
                latents = self.autoencoder.encoder(pixels)
            bits = straight_through_sign(latents)
            sent = bits if is_flipped is None else torch.where(is_flipped, -bits, bits)
            decoded = self.autoencoder.decoder(sent, noise)
        return latents.float(), bits.float(), decoded.float()


class TokenizerObjective:
    """The losses of the autoencoder and of the discriminator.

    total = l1 + l2 + edge + lpips + adversarial (each weighted, of pixels in [-1, 1])
            + entropy_weight * (E[H(q)] - H[E q]) + commit_weight * mean |x - sign x|^2;
    the last two are left out where the encoder is not trained.

    Args:
        config: weights of the losses.
        lpips: distances [N] of two batches of pixels; None where its weight is 0.
    """

    def __init__(self, config: TokenizerConfig, lpips: nn.Module | None) -> None:
        self._config, self._lpips = config, lpips
        self._dtype = getattr(torch, config.run.dtype)

    def has_adversary(self, step: int) -> bool:
        """Whether a step, counted from 0, has a discriminator."""
        section = self._config.adversarial
        return section.weight > 0 and step >= section.start_step

    def losses(
        self,
        crops: Crops,
        outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        discriminator: PatchDiscriminator | None,
    ) -> dict[str, torch.Tensor]:
        """This rank's parts of `LOSSES`, unweighted; but `entropy_codebook` is whole on every rank.

        Args:
            crops: what the outputs are of.
            outputs: those of `Reconstructor`.
            discriminator: judges the reconstructions; None: the adversarial loss is 0.
        """
        latents, bits, decoded = outputs
        pixels, part = crops.pixels, crops.part
        zero = decoded.new_zeros(())
        entropy = entropy_loss(
            rearrange(latents, "n c h w -> (n h w) c"),
            self._config.num_groups,
            self._config.quantiser.temperature,
            num_tokens=crops.num_images * latents[0, 0].numel(),
            sum_over_ranks=summed,
        )
        adversarial, lpips = zero, zero
        if discriminator is not None:
            with self._autocast(pixels):
                (fake,) = discriminator(decoded)
            adversarial = generator_loss(fake, crops.num_images)
        if self._lpips is not None:
            lpips = self._lpips(decoded, pixels).sum() / crops.num_images
        return {
            "l1": part * F.l1_loss(decoded, pixels),
            "l2": part * F.mse_loss(decoded, pixels),
            "edge": part * edge_loss(decoded, pixels),
            "lpips": lpips,
            "adversarial": adversarial,
            "entropy_token": entropy.token,
            "entropy_codebook": entropy.codebook,
            "commit": part * F.mse_loss(latents, bits.detach()),
        }

    def total(self, losses: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """The weighted sum of `losses`; `step` counts from 0."""
        quantiser, reconstruction = self._config.quantiser, self._config.reconstruction
        total = (
            reconstruction.l1_weight * losses["l1"]
            + reconstruction.l2_weight * losses["l2"]
            + reconstruction.edge_weight * losses["edge"]
            + reconstruction.lpips_weight * losses["lpips"]
            + self._config.adversarial.weight * losses["adversarial"]
        )
        if self._config.run.trains == "decoder":
            return total
        entropy = losses["entropy_token"] - losses["entropy_codebook"]
        return total + entropy_weight(quantiser, step) * entropy + quantiser.commit_weight * losses["commit"]

    def judged(
        self, crops: Crops, decoded: torch.Tensor, discriminator: ReplicatedNetwork
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, 1, h, w] of originals and of reconstructions, with the gradients of the discriminator alone."""
        with self._autocast(crops.pixels):
            real, fake = discriminator(crops.pixels, decoded.detach())
        return real, fake

    def discriminator_losses(
        self, crops: Crops, logits: tuple[torch.Tensor, torch.Tensor], averages: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """This rank's parts of `DISCRIMINATOR_LOSSES`, unweighted."""
        return discriminator_loss(*logits, crops.num_images, averages)._asdict()

    def discriminator_total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of `discriminator_losses`."""
        return losses["hinge"] + self._config.adversarial.lecam_weight * losses["lecam"]

    def _autocast(self, pixels: torch.Tensor) -> torch.autocast:
        return torch.autocast(pixels.device.type, self._dtype, enabled=self._dtype != torch.float32)


def entropy_weight(section: QuantiserSection, step: int) -> float:
    """The weight of the entropy loss in a step, counted from 0."""
    ramp = max(0.0, 1 - step / section.entropy_ramp_steps)
    return section.entropy_weight * (1 + section.entropy_ramp * ramp)


def edge_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between horizontal and vertical neighbours, of images [N, 3, H, W]."""
    error = decoded - pixels
    return 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def draw_noise(
    config: TokenizerConfig, step: int, slots: Sequence[int], size_px: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The random numbers of a step's images, each a function of seed, step and slot alone.

    Returns:
        Which bits are flipped, bool [N, C, h, w], with probability flip_max * u, u ~ U(0, 1) per image; and the
        decoder's noise, float32 of the same shape. None where the run has none.
    """
    network, flip_max = config.autoencoder, config.quantiser.flip_max
    shape = (network.num_bits, *(side // network.downsample for side in size_px))
    flips, noises = [], []
    for slot in slots:
        rng = generator(config.run.seed, Purpose.TOKENIZER, step, slot)
        if flip_max:
            level = flip_max * rng.random(dtype=np.float32)
            flips.append(rng.random(shape, dtype=np.float32) < level)
        if network.gan_decoder:
            noises.append(rng.standard_normal(shape, dtype=np.float32))
    return (
        torch.from_numpy(np.stack(flips)).to(device) if flips else None,
        torch.from_numpy(np.stack(noises)).to(device) if noises else None,
    )
