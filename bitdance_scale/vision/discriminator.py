"""The patch discriminator of tokenizer training, and the losses between it and the autoencoder.

Networks and losses see the images of one rank, and are of the global batch: whoever calls them says how a tensor is
summed over ranks. Shapes: N images of this rank, H x W pixels, h x w logits per image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over data-parallel ranks; its gradient is the sum of the ranks' gradients."""

KERNEL_SIDE = 4
NEGATIVE_SLOPE = 0.2
INIT_STD = 0.02
MAX_WIDENING = 8
NORM_EPS = 1e-5


def one_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of a job of one."""
    return tensor


class PatchDiscriminator(nn.Module):
    """Images to a logit for every patch: high for real ones (the PatchGAN of Isola et al. 2017, arXiv 1611.07004).

    4 x 4 convolutions: the first and the next `num_layers - 1` halve the sides, and each doubles the channels up to
    eight times `channels`; two more at the same resolution end it. Leaky ReLUs, and batch norms between the ends.

    Args:
        channels: channels of the first convolution.
        num_layers: convolutions between the first and the last.
        sum_over_ranks: makes the batch norms those of the global batch.
    """

    def __init__(self, channels: int, num_layers: int, sum_over_ranks: SumOverRanks = one_rank) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, channels, stride=2), nn.LeakyReLU(NEGATIVE_SLOPE)]
        width = channels
        for layer in range(1, num_layers + 1):
            next_width = channels * min(2**layer, MAX_WIDENING)
            layers += [
                _convolution(width, next_width, stride=2 if layer < num_layers else 1, bias=False),
                GlobalBatchNorm(next_width, sum_over_ranks),
                nn.LeakyReLU(NEGATIVE_SLOPE),
            ]
            width = next_width
        layers.append(_convolution(width, 1, stride=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, *batches: torch.Tensor) -> list[torch.Tensor]:
        """Logits [N, 1, h, w] of each batch of pixels [N, 3, H, W]; every batch is normalised by itself."""
        return [self.layers(pixels) for pixels in batches]


def _convolution(in_width: int, out_width: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    convolution = nn.Conv2d(in_width, out_width, KERNEL_SIDE, stride=stride, padding=1, bias=bias)
    nn.init.normal_(convolution.weight, 0.0, INIT_STD)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


class GlobalBatchNorm(nn.Module):
    """Batch norm over the images of all ranks, however many each of them has.

    `nn.SyncBatchNorm` does the same on GPUs alone. There are no running statistics: nothing is ever computed with a
    discriminator outside training. Computes in float32 and returns the dtype of its input.

    Args:
        width: channels.
        sum_over_ranks: sums over the ranks.
    """

    def __init__(self, width: int, sum_over_ranks: SumOverRanks) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).normal_(1.0, INIT_STD))
        self.bias = nn.Parameter(torch.zeros(width))
        self._sum_over_ranks = sum_over_ranks

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises [N, width, h, w]."""
        values = hidden.float()
        count = values.new_full((1,), values.numel() / values.shape[1])
        total = self._sum_over_ranks(torch.cat([values.sum(dim=(0, 2, 3)), count]))
        count = total[-1].detach()
        centred = values - (total[:-1] / count)[:, None, None]
        # In a second pass: the difference of two large sums would lose the variance.
        variance = self._sum_over_ranks(centred.square().sum(dim=(0, 2, 3))) / count
        scale = self.weight * torch.rsqrt(variance + NORM_EPS)
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(hidden.dtype)


class DiscriminatorLoss(NamedTuple):
    """This rank's part of the terms of the discriminator's loss; the sum over ranks is that of the global batch.

    Attributes:
        hinge: 0.5 (mean relu(1 - real) + mean relu(1 + fake)).
        lecam: mean relu(real - average fake)^2 + mean relu(average real - fake)^2, unweighted.
    """

    hinge: torch.Tensor
    lecam: torch.Tensor


def generator_loss(fake: torch.Tensor, num_images: int) -> torch.Tensor:
    """This rank's part of mean softplus(-mean logit of an image): the non-saturating loss of the autoencoder.

    Args:
        fake: logits [N, 1, h, w] of reconstructions.
        num_images: images of the global batch.
    """
    return F.softplus(-fake.float().mean(dim=(1, 2, 3))).sum() / num_images


def discriminator_loss(
    real: torch.Tensor, fake: torch.Tensor, num_images: int, averages: torch.Tensor
) -> DiscriminatorLoss:
    """Hinge loss and LeCam regulariser (Tseng et al. 2021, arXiv 2104.03310).

    Args:
        real: logits [N, 1, h, w] of originals.
        fake: logits of their reconstructions, of the same shape.
        num_images: images of the global batch.
        averages: float32 [2], the moving averages of the mean logits of originals and of reconstructions, with those
            of this step taken in (`updated_averages`).
    """
    real, fake = real.float(), fake.float()
    scale = 1 / (num_images * real[0].numel())
    average_real, average_fake = averages.detach()
    return DiscriminatorLoss(
        hinge=0.5 * scale * (F.relu(1 - real).sum() + F.relu(1 + fake).sum()),
        lecam=scale * (F.relu(real - average_fake).square().sum() + F.relu(average_real - fake).square().sum()),
    )


@torch.no_grad()
def updated_averages(
    averages: torch.Tensor,
    real: torch.Tensor,
    fake: torch.Tensor,
    num_images: int,
    decay: float,
    sum_over_ranks: SumOverRanks = one_rank,
) -> torch.Tensor:
    """The moving averages of the mean logits, float32 [2], with those of one more global batch taken in."""
    scale = 1 / (num_images * real[0].numel())
    means = sum_over_ranks(torch.stack([real.float().sum(), fake.float().sum()]) * scale)
    return decay * averages + (1 - decay) * means
