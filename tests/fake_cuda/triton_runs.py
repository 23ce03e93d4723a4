"""Runs of `triton_run.py`, each made once and kept; prints the builds as a table.

PYTHONPATH=. python -m tests.fake_cuda.triton_runs
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitdance_scale.model.fused  # noqa: F401  (lists the formulas)
from bitdance_scale.model.formula import FORMULAS
from tests.fake_cuda.device import ROOT, start
from tests.fake_cuda.triton_builds import Build

GPUS = ("h100", "b200")
FLEX = (
    *(f"flex_{name}_bfloat16" for name in ("14b", "0p6b", "imagenet_h", "small")),
    *(f"flex_{name}_float32" for name in ("14b", "imagenet_h")),
)
"""Cases of FlexAttention that are built."""
FUSED = tuple(sorted(FORMULAS))
NARROW = tuple(f"{name}_narrow" for name in FUSED)
WHOLE, RAGGED, POSITIONS = (8192, 6400, 16896), (8190, 6401), (2048, 1536)
"""Lengths of packs that end with a whole tile and with a ragged one, and numbers of positions of formulas."""
_TRITON = Path(sys.prefix) / "triton"
TIMEOUT_S = 1800.0


def why_no_triton() -> str | None:
    """Why Triton cannot be imported by a run; None if it can."""
    if _TRITON.is_dir() or importlib.util.find_spec("triton") is not None:
        return None
    return f"needs Triton in {_TRITON}, which make fake-cuda installs"


@functools.cache
def run(what: str, cases: tuple[str, ...], gpu: str, lengths: tuple[int, ...], plant: str | None = None) -> Any:
    """What `triton_run.py` prints.

    Args:
        what: "builds" or "values".
        cases: of `compiled_cases.CASES`.
        gpu: of `triton_run.GPUS`.
        lengths: numbers of positions, the first of which is compiled for.
        plant: a fault.

    Raises:
        RuntimeError: it fails; with the error.
    """
    variables = {"PYTHONPATH": f"{ROOT}:{_TRITON}"} | ({"TRITON_INTERPRET": "1"} if what == "values" else {})
    arguments = [what, *cases, "--gpu", gpu, "--lengths", *map(str, lengths), *(["--plant", plant] if plant else [])]
    return json.loads(start("tests.fake_cuda.triton_run", arguments, TIMEOUT_S, variables))


def builds(cases: tuple[str, ...], gpu: str, lengths: tuple[int, ...], plant: str | None = None) -> dict[str, Any]:
    """Case -> kernel -> its builds, one for every configuration that Inductor would measure, in order of launches."""
    kernels: dict[str, dict[str, list[Build]]] = {case: {} for case in cases}
    for case, result in run("builds", cases, gpu, lengths, plant).items():
        for values in result["builds"]:
            kernels[case].setdefault(values["kernel"], []).append(Build(**values))
    return kernels


def least_spilling(choices: list[Build]) -> Build:
    """The configuration of a kernel that spills least; of several, the first: Inductor leaves out those that spill."""
    return min(choices, key=lambda build: build.spill_bytes)


def _rows() -> Iterator[list[object]]:
    yield ["kernel", "GPU", "warps", "stages", "registers", "spill, B", "shared, B", "tensor memory", "products", "s"]
    yield ["---"] * 10
    for cases, lengths in ((FLEX, WHOLE), (FUSED, POSITIONS)):
        for gpu in GPUS:
            for case, kernels in builds(cases, gpu, lengths).items():
                for number, choices in enumerate(kernels.values()):
                    chosen = least_spilling(choices)
                    yield [
                        f"{case}, {number + 1} of {len(kernels)}",
                        gpu,
                        chosen.num_warps,
                        chosen.num_stages,
                        chosen.num_registers,
                        chosen.spill_bytes,
                        chosen.shared_bytes,
                        chosen.num_tensor_columns,
                        " ".join(f"{kind} {number}" for kind, number in chosen.matrix_instructions.items()),
                        f"{chosen.seconds:.1f}",
                    ]


if __name__ == "__main__":
    for row in _rows():
        print("| " + " | ".join(map(str, row)) + " |")
