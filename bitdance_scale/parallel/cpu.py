"""Lets Megatron-core run on machines without CUDA; does nothing where CUDA is present.

Megatron-core asks for the current CUDA device in its collectives and in its pipeline schedule. Without CUDA these few
calls are answered with the CPU, so that the very same schedule and layers run over gloo: that is how every layout is
proved in the tests. Nothing numerical is replaced.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch


class _TorchWithoutCuda(ModuleType):
    """The torch module as Megatron's schedule sees it: factory calls for "cuda" make CPU tensors."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: object, **options: object) -> torch.Tensor:
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return torch.zeros(*size, **options)


def redirect_cuda_calls() -> None:
    """Answers Megatron-core's and DeepSpeed's questions about CUDA with the CPU; call before importing either."""
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda device=None: None
    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _TorchWithoutCuda()
