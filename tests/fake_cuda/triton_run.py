"""Compiles a case for a fake GPU, and builds its kernels or runs them in Triton's interpreter; prints JSON.

    python -m tests.fake_cuda.triton_run builds CASE --gpu h100 --lengths 8192 6400
    python -m tests.fake_cuda.triton_run values CASE --gpu h100 --lengths 384 200

Started by `device.start`, which preloads the device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tests.fake_cuda.device import B200, H100
from tests.fake_cuda.generated_kernels import Compilation, compilation_for

GPUS = {"h100": H100, "b200": B200}
PLANTS: dict[str, dict[str, Any]] = {
    "spill": {"num_warps": 4},
    "shared": {"num_stages": 8},
    "scale": {"SM_SCALE": 0.1},
}
"""Options of FlexAttention's kernels that are faults, each found by another check."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("builds", "values"))
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--plant", choices=(*PLANTS, "lengths"), help="a fault, to show that it is found")
    options = parser.parse_args()
    # Standard output is for the result alone.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with compilation_for(GPUS[options.gpu], is_interpreted=options.what == "values") as compilation:
        from tests.fake_cuda.compiled_cases import CASES

        run = _builds if options.what == "builds" else _values
        with _planted(options.plant):
            result = {name: run(CASES[name], options.lengths, compilation) for name in options.cases}
    json.dump(result, out)
    out.flush()
    os._exit(0)


@contextlib.contextmanager
def _planted(fault: str | None) -> Iterator[None]:
    from bitdance_scale.model import attention

    attend = attention.flex_attention

    def attend_wrongly(*heads: torch.Tensor, kernel_options: dict[str, Any], **options: Any) -> torch.Tensor:
        return attend(*heads, kernel_options=kernel_options | PLANTS[fault], **options)

    if fault == "lengths":
        # The compiler is not told that lengths change.
        with mock.patch.object(torch._dynamo, "mark_dynamic", lambda *_: None):
            yield
    elif fault is not None:
        with mock.patch.object(attention, "flex_attention", attend_wrongly):
            yield
    else:
        yield


def _builds(case: Any, lengths: list[int], compilation: Compilation) -> dict[str, object]:
    """Builds of the kernels that are compiled for the first length, and what was compiled for the others."""
    from tests.fake_cuda.triton_builds import build_all

    # Otherwise the compiler takes what differs between cases for something that changes.
    torch._dynamo.reset()
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
    """For every length: name of a result -> norm of its difference from the expected values, over their norm."""
    torch._dynamo.reset()
    differences = []
    for length in lengths:
        found, expected = case.run(length, compilation), case.expected(length)
        assert list(found) == list(expected)
        differences.append({name: _difference(found[name], expected[name]) for name in found})
    return differences


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    return float((found.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
