"""The flow between noise and bits, and the training loss (arXiv 2602.14041 Eq. 3 and 7, Sec. 4.3).

Time runs from 0 (Gaussian noise) to 1 (bits). The head predicts clean bits; the flow loss compares velocities.

The loss is a mean over the *global* batch. Micro-batches hold unequal numbers of targets, so a mean of their means
would weigh targets unequally. Each micro-batch therefore contributes sums, divided by the counts of the whole batch,
and no layout changes the gradient.

Shape suffixes: B blocks, P tokens per block, C bits.
"""

from __future__ import annotations

import torch

from bitdance_scale.config.schema import HeadSection, LossSection
from bitdance_scale.errors import ConfigError

# Lower bound of 1 - t in a velocity: near t = 1 the quotient would amplify small errors of the prediction.
MIN_REMAINING_TIME = 0.05


def draw_time(normal_B: torch.Tensor, section: HeadSection) -> torch.Tensor:
    """Turns standard normals into the flow times of training.

    logit_normal (published release): t = sigmoid(std n + mean). uniform: t = Phi(n), where Phi is the distribution
    function of the normal, so that both schedules use the same random numbers. Then t -> t / (t + shift (1 - t)).

    Args:
        normal_B: N(0, 1), any shape.
        section: `time_schedule`, `time_mean`, `time_std`, `time_shift`.

    Returns:
        float32, t in [0, 1], in the shape of `normal_B`.

    Raises:
        ConfigError: an unknown `time_schedule`.
    """
    # In float64: how vectorised float32 functions round an element depends on its place in the pack. The head
    # multiplies t by 1000, so the last bit of t would make the loss depend on how samples are packed.
    normal_B = normal_B.double()
    if section.time_schedule == "logit_normal":
        t_B = torch.sigmoid(section.time_std * normal_B + section.time_mean)
    elif section.time_schedule == "uniform":
        t_B = torch.special.ndtr(normal_B)
    else:
        raise ConfigError(f"head.time_schedule = {section.time_schedule!r}: must be 'logit_normal' or 'uniform'")
    return (t_B / (t_B + section.time_shift * (1 - t_B))).float()


def interpolate(bits_BPC: torch.Tensor, noise_BPC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """The noisy state x_t = t x + (1 - t) e, float32 [B, P, C] (Eq. 3)."""
    t_B11 = t_B.float()[:, None, None]
    return t_B11 * bits_BPC.float() + (1 - t_B11) * noise_BPC.float()


def velocity(clean_BPC: torch.Tensor, noisy_BPC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """The velocity (x - x_t) / max(1 - t, 0.05) towards clean bits, float32 [B, P, C]."""
    remaining_B11 = (1 - t_B.float()).clamp(min=MIN_REMAINING_TIME)[:, None, None]
    return (clean_BPC.float() - noisy_BPC.float()) / remaining_B11


def flow_loss(
    pred_BPC: torch.Tensor, bits_BPC: torch.Tensor, noisy_BPC: torch.Tensor, t_B: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Squared error of the predicted velocity (Eq. 7), summed over tokens.

    Args:
        pred_BPC: float, bits predicted by the head.
        bits_BPC: the true bits, -1 and 1.
        noisy_BPC: float, the state the head saw.
        t_B: float, its flow time, one per block.

    Returns:
        (float32 scalar, B * P): the sum over tokens of the mean over bits, and the number of tokens. Without blocks
        the sum is zero, and still differentiable.
    """
    error_BPC = velocity(pred_BPC, noisy_BPC, t_B) - velocity(bits_BPC, noisy_BPC, t_B)
    num_blocks, block_tokens, num_bits = error_BPC.shape
    return error_BPC.square().sum() / num_bits, num_blocks * block_tokens


def block_losses(
    pred_BPC: torch.Tensor, bits_BPC: torch.Tensor, noisy_BPC: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """The flow loss of every block, a mean over its tokens and bits, float32 [B]; arguments as in `flow_loss`."""
    error_BPC = velocity(pred_BPC, noisy_BPC, t_B) - velocity(bits_BPC, noisy_BPC, t_B)
    return error_BPC.square().mean(dim=(1, 2))


def combine_losses(
    vision_sum: torch.Tensor,
    text_sum: torch.Tensor,
    global_vision_count: int,
    global_text_count: int,
    section: LossSection,
) -> torch.Tensor:
    """The part of the loss that one micro-batch contributes; the loss is its sum over micro-batches and replicas.

    Args:
        vision_sum: float32 scalar, `flow_loss` of the micro-batch.
        text_sum: float32 scalar, cross-entropy summed over the text targets of the micro-batch.
        global_vision_count: predicted vision tokens of the global batch.
        global_text_count: text targets of the global batch.
        section: the two weights.

    Returns:
        float32 scalar. A kind of target that is not in the global batch contributes zero.
    """
    vision = section.vision_weight * vision_sum / max(global_vision_count, 1)
    text = section.text_weight * text_sum / max(global_text_count, 1)
    return vision + text
