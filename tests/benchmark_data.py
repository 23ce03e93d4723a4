"""The published files of the benchmarks, which are not part of this project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VARIABLE = "BITDANCE_BENCHMARK_DATA"


def benchmark_data(name: str) -> Path:
    """A published file or folder: in the folder that `BITDANCE_BENCHMARK_DATA` names, or in ../shared/benchmark_data.

    The test is skipped where it is in neither.
    """
    folder = Path(os.environ.get(VARIABLE) or ROOT.parent / "shared/benchmark_data")
    if not (folder / name).exists():
        pytest.skip(f"{folder / name} is missing; {VARIABLE} names the folder of the benchmarks' published files")
    return folder / name
