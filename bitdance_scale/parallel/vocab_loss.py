"""Cross-entropy over a vocabulary that tensor-parallel ranks divide.

Each rank has the logits of its part of the table. Three numbers per target go around: the largest logit, the sum of the
exponentials and the target's own logit. The logits stay in the training dtype; what is computed of them is in float32,
and their gradient is written over them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from bitdance_scale.model import fused


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first_entry: int,
    num_entries: int,
    group: dist.ProcessGroup | None,
    is_compiled: bool,
) -> torch.Tensor:
    """The cross-entropy of every target, float32 [T]; a collective.

    Args:
        logits: [T, V], of this rank's rows of the table; the backward pass overwrites them.
        targets: int64 [T], of the whole vocabulary.
        first_entry: the rank's first row.
        num_entries: how many of its rows are entries; the others are padding, with no share of the softmax.
        group: the tensor-parallel ranks; None: there is one.
        is_compiled: see `model/fused_autograd.py`.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, targets, first_entry, num_entries, group, is_compiled)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first_entry: int,
        num_entries: int,
        group: dist.ProcessGroup | None,
        is_compiled: bool,
    ) -> torch.Tensor:
        largest = fused.largest_logit(logits, num_entries, is_compiled=is_compiled)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        terms = fused.exponential_sums(logits, targets, largest, first_entry, num_entries, is_compiled=is_compiled)
        if group is not None:
            dist.all_reduce(terms, group=group)
        total, at_target = terms.unbind(-1)
        ctx.save_for_backward(logits, targets, largest, total)
        ctx.settings = first_entry, num_entries, is_compiled
        return total.log() - at_target

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first_entry, num_entries, is_compiled = ctx.settings
        logits, *others = ctx.saved_tensors
        # Nobody else has the logits: the product that made them does not keep its result.
        logits = logits.detach()
        fused.cross_entropy_gradient(logits, *others, *gradients, first_entry, num_entries, is_compiled=is_compiled)
        return logits, None, None, None, None, None
