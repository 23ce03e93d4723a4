"""Gradients of replicated parameters of which every tensor-parallel rank computes a part.

Such are the weights of norms that a rank applies to its own heads or positions alone (`RMSNorm`), and matrices of
adapters under sequence parallelism (`Adapter`). The parts must be summed over the ranks. A module does this inside
autograd, for every micro-batch, which is right under every optimiser. An optimiser that lets gradients add up until the
step can sum all of them once, in one message and in the dtype in which they were accumulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from bitdance_scale.parallel.adapter import Adapter
from bitdance_scale.parallel.backbone import RMSNorm


def leave_gradients_partial(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Takes the sum out of autograd; returns the parameters whose gradients are parts from now on, in order.

    Who calls this must call `sum_over_tensor_ranks` with their gradients before it uses them. Without tensor
    parallelism there is none.

    Args:
        modules: the stages of a rank.
    """
    parts = [part for module in modules for part in module.modules() if isinstance(part, RMSNorm | Adapter)]
    partial = [part for part in parts if part.sums_in_backward]
    for part in partial:
        part.sums_in_backward = False
    return [parameter for part in partial for parameter in part.partial_parameters]


def sum_over_tensor_ranks(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sums gradients of one dtype over a group, in place, with one message; no message if there are none.

    Args:
        gradients: of the same parameters in the same order on all ranks of the group.
        group: the tensor-parallel ranks.
    """
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        list(gradients), [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
    )
