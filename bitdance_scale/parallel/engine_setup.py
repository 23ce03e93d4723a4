"""What must be set up before Megatron-core and DeepSpeed are imported.

- Without CUDA, the few calls in which the engines ask for the current CUDA device are answered with the CPU. The same
  schedule and layers then run over gloo, so that the tests can check every layout.
- Megatron-core is imported without packages that this project does not use: two seconds of processor time in every
  rank instead of seven.
- Warnings that no user of this project can act on are filtered.

No numerical code is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast
from unittest import mock

import torch

# Megatron-core reports that Transformer Engine and Apex are missing, which is how this project uses it, and calls
# functions that newer versions of PyTorch have renamed.
_WARNINGS = (
    ".*Apex are not installed.*",
    ".*Apex is not installed.*",
    ".*full scope is deprecated.*",
    ".*torch.distributed.all_gather_into_tensor. is deprecated.*",
    ".*torch.distributed.reduce_scatter_tensor. is deprecated.*",
)


def prepare_engines() -> None:
    """Sets this process up for the engines and imports Megatron-core; no engine may be imported before."""
    _filter_messages()
    if not torch.cuda.is_available():
        _answer_with_cpu()
    with _no_wandb(), no_compiler():
        import megatron.core  # noqa: F401  (imported for the side effect)
    if not torch.cuda.is_available():
        from megatron.core.pipeline_parallel import schedules

        schedules.torch = _TorchWithoutCuda()


def _filter_messages() -> None:
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not torch.cuda.is_available():
        # On a GPU this is advice worth following.
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _answer_with_cpu() -> None:
    # DeepSpeed chooses its accelerator when it is imported.
    os.environ["DS_ACCELERATOR"] = "cpu"
    answers: dict[str, Callable[..., object]] = {
        "current_device": lambda: "cpu",
        "synchronize": lambda device=None: None,
        # Of Megatron-core after 0.16, which would let it wait for events of CUDA graphs.
        "current_stream": lambda device=None: torch.cpu.current_stream(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


class _TorchWithoutCuda(ModuleType):
    """The torch module as Megatron-core's schedule sees it: `zeros` on "cuda" makes a CPU tensor."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return torch.zeros(*size, **options)


@contextlib.contextmanager
def no_compiler() -> Iterator[None]:
    """Within it `torch.compile` returns a function as it is, for engine code that is decorated but never called here.

    Decorating a function with `torch.compile` loads the compiler, which takes four seconds of processor time.
    Megatron-core decorates its fused layers when it is imported, DeepSpeed its Muon optimiser when an engine is built.
    """
    with mock.patch.object(torch, "compile", lambda function: function):
        yield


@contextlib.contextmanager
def _no_wandb() -> Iterator[None]:
    """Within it `wandb` looks absent; Megatron-core would import it for its inference server and its timers."""
    modules = cast(dict[str, ModuleType | None], sys.modules)
    if "wandb" in modules:
        yield
        return
    # None makes an import fail as it does without the package (Python's language reference, "The module cache").
    modules["wandb"] = None
    try:
        yield
    finally:
        del modules["wandb"]
