"""Faults that can be planted into a walk, to show that each kind of them is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist


def _on_the_wrong_device(loss: torch.Tensor) -> torch.Tensor:
    return loss + torch.ones(2).sum(dim=0, keepdim=True)


def _of_the_wrong_dtype(loss: torch.Tensor) -> torch.Tensor:
    matrix = torch.ones(4, 4, device=loss.device)
    return loss + (matrix @ matrix.bfloat16()).sum()


def _that_waits(loss: torch.Tensor) -> torch.Tensor:
    return loss * loss.item()


def _that_rank_1_leaves_out(loss: torch.Tensor) -> torch.Tensor:
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(3, device=loss.device))
    return loss


def _of_another_shape_on_rank_1(loss: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(torch.ones(4 if dist.get_rank() == 1 else 3, device=loss.device))
    return loss


def _of_another_dtype_on_rank_1(loss: torch.Tensor) -> torch.Tensor:
    dtype = torch.bfloat16 if dist.get_rank() == 1 else torch.float32
    dist.all_reduce(torch.ones(3, dtype=dtype, device=loss.device))
    return loss


def _in_another_order_on_rank_1(loss: torch.Tensor) -> torch.Tensor:
    sizes = (5, 3) if dist.get_rank() == 1 else (3, 5)
    for size in sizes:
        dist.all_reduce(torch.ones(size, device=loss.device))
    return loss


def _that_nobody_receives(loss: torch.Tensor) -> torch.Tensor:
    if dist.get_rank() == 1:
        dist.send(torch.ones(3, device=loss.device), dst=0)
    return loss


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "device": _on_the_wrong_device,
    "dtype": _of_the_wrong_dtype,
    "wait": _that_waits,
    "missing collective": _that_rank_1_leaves_out,
    "shape of a collective": _of_another_shape_on_rank_1,
    "dtype of a collective": _of_another_dtype_on_rank_1,
    "order of collectives": _in_another_order_on_rank_1,
    "send": _that_nobody_receives,
}
"""By name, what is done to the loss of a micro-batch."""


def plant(fault: str, replaced: contextlib.ExitStack) -> None:
    """Plants a fault into the loss of every micro-batch, until `replaced` is closed."""
    from bitdance_scale.parallel import step

    combined = step.combine_losses

    def combine(*values: object) -> torch.Tensor:
        return FAULTS[fault](combined(*values))

    replaced.enter_context(mock.patch.object(step, "combine_losses", combine))
