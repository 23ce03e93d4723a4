"""The learning rate of a step, of every kind of training."""

from __future__ import annotations

import math

from bitdance_scale.config.schema import RateSection


def learning_rate(section: RateSection, step: int, num_steps: int) -> float:
    """Rate of optimiser step `step` of `num_steps`, counted from 0.

    It warms up linearly. Then it is constant (arXiv 2602.14041 Table 4), but for the last `decay_steps`, or the whole
    of a shorter run, over which it falls linearly; or it falls from the end of the warm-up on, linearly or as half a
    cosine (published class-conditional release).
    """
    warmup = min(1.0, (step + 1) / max(1, section.warmup_steps))
    fall = section.decay_steps if section.schedule == "constant" else num_steps - section.warmup_steps
    left = min(1.0, (num_steps - step) / max(1, min(fall, num_steps)))
    if section.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return (section.lr - section.lr_min) * warmup * left + section.lr_min * warmup
