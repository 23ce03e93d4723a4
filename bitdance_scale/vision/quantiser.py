"""Lookup-free quantisation for training the tokenizer: straight-through signs and the group-wise entropy loss.

Shapes: N tokens, C bits per token, G groups of K = C / G bits each, 2^K codes per group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch.nn import functional as F

from bitdance_scale.vision.bits import sign_bits


class EntropyLoss(NamedTuple):
    """The two terms of Eq. 2 in nats, scalars, averaged over groups.

    Attributes:
        token: E[H(q)], how undecided single tokens are; at most K ln 2; the loss makes it small.
        codebook: H[E q], how evenly the codes are used; at most K ln 2; the loss makes it large.
    """

    token: torch.Tensor
    codebook: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """E[H(q)] - H[E q]."""
        return self.token - self.codebook


def straight_through_sign(latents: torch.Tensor) -> torch.Tensor:
    """Signs of the latents (arXiv 2602.14041 Eq. 1) with the gradient of the identity; same shape and dtype."""
    # The second term is exactly 0, so the signs are exact in bfloat16; x + (sign x - x) would round.
    return sign_bits(latents).detach() + (latents - latents.detach())


def entropy_loss(
    latents: torch.Tensor,
    num_groups: int,
    temperature: float,
    num_tokens: int | None = None,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> EntropyLoss:
    """E[H(q)] - H[E q], with the channels in groups (arXiv 2602.14041 Eq. 2 and Sec. 3.1).

    For a group x of K channels and the codebook {-1, +1}^K,

        q_c(x) = exp(-|x - c|^2 / temperature) / sum over codes c' of exp(-|x - c'|^2 / temperature),

    where the expectation is over tokens, and both terms are means over groups. |x|^2 and |c|^2 are the same for every
    code, so q factorises into independent bits, p(c_k = +1) = sigmoid(4 x_k / temperature). H(q) is therefore the sum
    of K binary entropies. Only E q, which does not factorise, is computed over the 2^K codes.

    Args:
        latents: [N, C], any floating dtype; the loss is computed in float32.
        num_groups: G, a divisor of C; memory grows with N * G * 2^(C / G).
        temperature: in units of squared latent distance; lower is sharper.
        num_tokens: tokens of the global batch, of which these are this rank's part; None: N. `token` is this rank's
            part of the mean, and the parts of all ranks add up.
        sum_over_ranks: sums a tensor without gradient over data-parallel ranks. E q is then that of the global batch,
            and `codebook` the same on all ranks, while its gradient flows through the local tokens alone: the ranks'
            gradients add up to that of the global loss. None: one rank.

    Raises:
        ValueError: `num_groups` does not divide C, or a group has more than 16 bits.
    """
    num_bits = latents.shape[-1]
    if num_bits % num_groups or num_bits // num_groups > 16:
        raise ValueError(
            f"{num_bits} bits in {num_groups} groups: every group must have the same number of bits, at most 16"
        )
    logits = 4.0 / temperature * rearrange(latents.float(), "n (g k) -> n g k", g=num_groups)
    plus = torch.sigmoid(logits)
    # H(sigmoid(a)) = softplus(a) - a sigmoid(a); stable where the probability rounds to 0 or 1.
    part = 1 / (num_tokens or len(latents))
    token = (F.softplus(logits) - logits * plus).sum(dim=-1).mean(dim=-1).sum() * part

    mean_code = _code_probabilities(plus).sum(dim=0) * part
    if sum_over_ranks is not None:
        mean_code = mean_code + (sum_over_ranks(mean_code.detach()) - mean_code.detach())
    codebook = torch.special.entr(mean_code.clamp_min(torch.finfo(torch.float32).tiny)).sum(dim=-1).mean()
    return EntropyLoss(token, codebook)


def code_usage(bits: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Share of the tokens with bits [N, C] that use each code, float32 [G, 2^K]; bit 0 of a group is the highest."""
    return _code_probabilities((rearrange(bits, "n (g k) -> n g k", g=num_groups) > 0).float()).mean(dim=0)


def _code_probabilities(plus: torch.Tensor) -> torch.Tensor:
    """[N, G, 2^K] from the probabilities [N, G, K] that each bit is +1."""
    codes = plus.new_ones((*plus.shape[:-1], 1))
    for k in range(plus.shape[-1]):
        pair = torch.stack([1 - plus[..., k], plus[..., k]], dim=-1)
        codes = (codes.unsqueeze(-1) * pair.unsqueeze(-2)).flatten(-2)
    return codes
