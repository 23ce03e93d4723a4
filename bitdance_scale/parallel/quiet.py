"""Silences what the engines say about themselves and no user of this project can act on."""

from __future__ import annotations

import logging
import warnings

import torch

# Megatron-core tells that it runs without Transformer Engine and Apex, which is how this project uses it, and calls
# functions that newer PyTorch has renamed.
_MESSAGES = (
    ".*Apex are not installed.*",
    ".*Apex is not installed.*",
    ".*full scope is deprecated.*",
    ".*torch.distributed.all_gather_into_tensor. is deprecated.*",
    ".*torch.distributed.reduce_scatter_tensor. is deprecated.*",
)


def silence_engines() -> None:
    """Filters these warnings in this process and keeps DeepSpeed to warnings; call before importing either engine."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    if not torch.cuda.is_available():
        # On a GPU this is advice worth following.
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
