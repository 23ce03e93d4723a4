"""The compilers that PyTorch and Triton use to build kernels at run time."""

from __future__ import annotations

import os
import shutil

COMPILERS = {"c": ("CC", ("gcc", "clang")), "c++": ("CXX", ("g++", "clang++"))}
"""Language -> (environment variable that names one, programs that are looked for in this order)."""


def find_compiler(language: str) -> str | None:
    """The compiler that would be used, which may not exist if the environment names it; None: there is none.

    Args:
        language: c, for what launches Triton's kernels on CUDA; or c++, for PyTorch's kernels on a processor.
    """
    variable, programs = COMPILERS[language]
    return os.environ.get(variable) or next(filter(None, map(shutil.which, programs)), None)
