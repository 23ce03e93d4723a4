"""Losses as sums and counts, so that no layout changes the gradient (arXiv 2602.14041 Sec. 4.3).

Both losses are means over the *global* batch. Micro-batches hold unequal numbers of targets, so a mean of their means
would weigh targets unequally. Each micro-batch therefore yields a sum, divided by the count of the whole batch.
"""

from __future__ import annotations

import torch

from bitdance_scale.config.schema import LossSection


def combine(
    vision_sum: torch.Tensor,
    text_sum: torch.Tensor,
    global_vision_count: int,
    global_text_count: int,
    section: LossSection,
) -> torch.Tensor:
    """The part of the loss that one micro-batch contributes; its sum over micro-batches and ranks is the loss.

    Args:
        vision_sum: float32 scalar, `flow.flow_loss` of the micro-batch.
        text_sum: float32 scalar, cross-entropy summed over its text targets.
        global_vision_count: predicted vision tokens of the global batch.
        global_text_count: text targets of the global batch.
        section: the two weights.

    Returns:
        float32 scalar. A kind of target that the global batch does not hold contributes zero.
    """
    vision = section.vision_weight * vision_sum / max(global_vision_count, 1)
    text = section.text_weight * text_sum / max(global_text_count, 1)
    return vision + text
