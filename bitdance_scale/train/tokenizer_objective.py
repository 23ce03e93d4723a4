"""The loss that trains the binary visual tokenizer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.quantiser import entropy_loss, straight_through_sign


class TokenizerObjective(nn.Module):
    """Autoencoder and losses in one module, so that a data-parallel wrapper sees one forward.

    total = l1 + l2 + edge (each weighted, on pixels in [-1, 1])
            + entropy_weight * (E[H(q)] - H[E q]) + commit_weight * mean |x - sign x|^2.
    """

    def __init__(self, autoencoder: Autoencoder, config: TokenizerConfig) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.quantiser = config.quantiser
        self.reconstruction = config.reconstruction
        self.dtype = getattr(torch, config.run.dtype)

    def forward(self, pixels: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            pixels: float32 [N, 3, H, W] in [-1, 1].
            generator: of the bit flips, on the device of `pixels`.

        Returns:
            Scalars: `total`, with gradient, and its unweighted parts `l1`, `l2`, `edge`, `entropy_token`,
            `entropy_codebook` and `commit`.
        """
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            latents = self.autoencoder.encoder(pixels)
            bits = straight_through_sign(latents)
            decoded = self.autoencoder.decoder(self._flip(bits, generator)).float()
        latents = latents.float()
        entropy = entropy_loss(
            rearrange(latents, "n c h w -> (n h w) c"),
            self.quantiser.num_groups,
            self.quantiser.temperature,
            _mean_over_ranks,
        )
        losses = {
            "l1": F.l1_loss(decoded, pixels),
            "l2": F.mse_loss(decoded, pixels),
            "edge": edge_loss(decoded, pixels),
            "entropy_token": entropy.token,
            "entropy_codebook": entropy.codebook,
            "commit": F.mse_loss(latents, bits.detach().float()),
        }
        losses["total"] = (
            self.reconstruction.l1_weight * losses["l1"]
            + self.reconstruction.l2_weight * losses["l2"]
            + self.reconstruction.edge_weight * losses["edge"]
            + self.quantiser.entropy_weight * entropy.loss
            + self.quantiser.commit_weight * losses["commit"]
        )
        return losses

    def _flip(self, bits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flips each bit with probability flip_max * u, u ~ U(0, 1) per image."""
        if self.quantiser.flip_max == 0:
            return bits
        level = torch.rand((len(bits), 1, 1, 1), generator=generator, device=bits.device)
        draw = torch.rand(bits.shape, generator=generator, device=bits.device)
        return torch.where(draw < self.quantiser.flip_max * level, -bits, bits)


def edge_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between horizontal and vertical neighbours, of images [N, 3, H, W]."""
    error = decoded - pixels
    return 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def _mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized():
        return tensor
    mean = tensor.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()
