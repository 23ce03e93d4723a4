"""Lets torchvision be imported beside a torch that it was not built for.

Such a pair is common: pip finds torchvision for CUDA beside torch for the CPU. Its compiled part cannot be loaded then,
and the import ends with `operator torchvision::nms does not exist`, for transformers as well, which imports torchvision
where it is installed. What is used here needs none of these operators.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys

import torch

# Those that torchvision describes when it is imported.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# Operators are gone with the object that declared them.
_declared: list[torch.library.Library] = []


def declare_operators() -> None:
    """Declares the operators of torchvision that its compiled part would bring, where that cannot be loaded.

    To be called before torchvision, or transformers, is imported. Does nothing where torchvision is not installed.
    """
    spec = None if "torchvision" in sys.modules else importlib.util.find_spec("torchvision")
    if spec is None:
        return
    compiled = importlib.machinery.PathFinder.find_spec("_C", spec.submodule_search_locations)
    if compiled is not None and compiled.origin is not None:
        # Built for another torch: declared below.
        with contextlib.suppress(OSError):
            torch.ops.load_library(compiled.origin)
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _SCHEMA)
        _declared.append(library)
