"""Errors of one rank raised on all: a rank that gives up alone leaves the others waiting in a collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Runs a block that may fail on some ranks of the job only, and raises its first error on all of them.

    One number is summed; the errors themselves travel only when there are any. Without a process group it does nothing.

    Args:
        device: where the job's ranks communicate.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    num_errors = torch.tensor([int(error is not None)], dtype=torch.int32, device=device)
    dist.all_reduce(num_errors)
    if num_errors.item():
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        raise next(found for found in errors if found is not None)
