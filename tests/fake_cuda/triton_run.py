"""Compiles a case for a fake GPU, and builds its kernels or runs them in Triton's interpreter; prints JSON.

    python -m tests.fake_cuda.triton_run builds CASE --gpu h100 --lengths 8192 6400
    python -m tests.fake_cuda.triton_run values CASE --gpu h100 --lengths 384 200

Started by `device.start`, which preloads the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import Any

import torch

from tests.fake_cuda.device import B200, H100
from tests.fake_cuda.generated_kernels import Compilation, compilation_for

GPUS = {"h100": H100, "b200": B200}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("builds", "values"))
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    options = parser.parse_args()
    # Standard output is for the result alone.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with compilation_for(GPUS[options.gpu], is_interpreted=options.what == "values") as compilation:
        from tests.fake_cuda.compiled_cases import CASES

        run = _builds if options.what == "builds" else _values
        result = {name: run(CASES[name], options.lengths, compilation) for name in options.cases}
    json.dump(result, out)
    out.flush()
    os._exit(0)


def _builds(case: Any, lengths: list[int], compilation: Compilation) -> dict[str, object]:
    """Builds of the kernels that are compiled for the first length, and what was compiled for the others."""
    from tests.fake_cuda.triton_builds import build_all

    first_kernel, num_graphs = len(compilation.kernels), compilation.num_graphs
    launched = []
    for length in lengths:
        compilation.launched.clear()
        case.run(length, compilation)
        launched.append(list(compilation.launched))
    kernels = compilation.kernels[first_kernel:]
    return {
        "num_graphs": compilation.num_graphs - num_graphs,
        "launched": launched,
        "builds": [dataclasses.asdict(build) for kernel in kernels for build in build_all(kernel)],
    }


def _values(case: Any, lengths: list[int], compilation: Compilation) -> list[dict[str, float]]:
    """For every length: name -> norm of the difference from the expected values, over their norm."""
    differences = []
    for length in lengths:
        found, expected = case.run(length, compilation), case.expected(length)
        assert list(found) == list(expected)
        differences.append({name: _difference(found[name], expected[name]) for name in found})
    return differences


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
