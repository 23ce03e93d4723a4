"""What to do when a device has too little memory for the images of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bitdance_scale.errors import ConfigError

# The CPU's allocator has no error of its own.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextlib.contextmanager
def refused_batch_size(batch_size: int, remark: str = "") -> Iterator[None]:
    """Within it, a device that runs out of memory is an error that names the option `--batch-size`.

    Args:
        batch_size: its value.
        remark: what else another value means for the command; " and .." at the end of the advice.

    Raises:
        ConfigError: the device ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if batch_size == 1:
            fix = (
                "take smaller images (--size), or draw with a run and `bitdance evaluate draw` under more "
                "tensor-parallel ranks (parallel.tensor)"
            )
        else:
            fix = f"try --batch-size {batch_size // 2}{remark}"
        raise ConfigError(
            f"--batch-size {batch_size}: so many images at a time need more memory than the device has; {fix}. "
            f"docs/generation.md says how much they take ({str(error).splitlines()[0]})"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation on a GPU or on the CPU failed for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)
