"""Arrays of the loader as tensors on the device."""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on a device, of the same shape and dtype.

    On the CPU the two share memory. Copies to CUDA go through pinned memory, or each would first wait for everything
    that its stream has been given before.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
