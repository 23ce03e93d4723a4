"""Kernels that are compiled for CUDA: built for an H100 and a B200 that are not there, run by Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bitdance_scale.model.fused import FORMULAS
from tests.fake_cuda.device import B200, H100, start
from tests.fake_cuda.triton_builds import Build

_TRITON = Path(sys.prefix) / "triton"
_TIMEOUT_S = 1800.0

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.usefixtures("fake_cuda"),
    pytest.mark.timeout(2 * _TIMEOUT_S),
    pytest.mark.skipif(
        not _TRITON.is_dir() and importlib.util.find_spec("triton") is None,
        reason=f"needs Triton in {_TRITON}, which make fake-cuda installs",
    ),
]

GPUS = {"h100": H100, "b200": B200}
MATRIX_INSTRUCTIONS = {"h100": "wgmma.mma_async", "b200": "tcgen05.mma"}
MAX_SPILL_BYTES = 512
"""What a thread may store and load for want of registers, all instructions of a kernel that do so together.

The backward pass of attention at 128 channels takes all 255 registers on both GPUs with the sizes of blocks for which
Inductor's templates are tuned: 328 bytes were counted on the H100 and 504 on the B200, 63 numbers of 4 bytes each
stored and loaded. More than that would be a new cause, and is to be looked into.
"""
FLEX = (
    *(f"flex_{name}_bfloat16" for name in ("14b", "0p6b", "imagenet_h", "small")),
    *(f"flex_{name}_float32" for name in ("14b", "imagenet_h")),
)
FUSED = tuple(sorted(FORMULAS))


@functools.cache
def _run(what: str, cases: tuple[str, ...], gpu: str, lengths: tuple[int, ...], *more: str) -> Any:
    variables = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{_TRITON}"}
    if what == "values":
        variables["TRITON_INTERPRET"] = "1"
    arguments = [what, *cases, "--gpu", gpu, "--lengths", *map(str, lengths), *more]
    return json.loads(start("tests.fake_cuda.triton_run", arguments, _TIMEOUT_S, variables))


def _builds(case: str, cases: tuple[str, ...], gpu: str, lengths: tuple[int, ...]) -> dict[str, list[Build]]:
    """Kernel -> its builds, after the checks that are the same for all: one compilation, launches for every length."""
    result = _run("builds", cases, gpu, lengths)[case]
    assert result["num_graphs"] == 1
    kernels: dict[str, list[Build]] = {}
    for values in result["builds"]:
        kernels.setdefault(values["kernel"], []).append(Build(**values))
    assert kernels and result["launched"] == [list(kernels)] * len(lengths)
    return kernels


def _check(builds: Sequence[Build], gpu: str) -> None:
    """Of the configurations that Inductor measures, one can run well, and none needs more memory than there is."""
    limit = GPUS[gpu].shared_memory_per_block_optin
    assert all(build.shared_bytes <= limit for build in builds), builds
    assert min(build.spill_bytes for build in builds) <= MAX_SPILL_BYTES, builds


# Packs end with a whole tile or with a ragged one; each has a kernel of its own.
@pytest.mark.parametrize(
    ("cases", "lengths"), [(FLEX, (8192, 6400, 16896)), (FLEX[:1], (8190, 6401))], ids=["whole", "ragged"]
)
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_flex_attention_is_built_once_for_all_lengths(gpu, cases, lengths):
    for case in cases:
        kernels = _builds(case, cases, gpu, lengths)
        for builds in kernels.values():
            _check(builds, gpu)
        forward, _, backward = kernels
        assert "flex_attention" in forward and "flex_attention_backward" in backward
        if case.endswith("bfloat16"):
            for build in kernels[forward] + kernels[backward]:
                assert build.matrix_instructions.get(MATRIX_INSTRUCTIONS[gpu], 0) > 0, build


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_formulas_are_built_once_for_all_lengths(gpu, name):
    for builds in _builds(name, FUSED, gpu, (2048, 1536)).values():
        _check(builds, gpu)


@pytest.mark.parametrize(
    ("name", "bound"),
    # float16 has 11 bits, and inputs have as many on both sides: roundings of probabilities and results differ. The
    # kernels for it have the blocks of those for bfloat16, which the interpreter cannot multiply.
    [("flex_small_float32", 1e-5), ("flex_small_float16", 1e-3)],
)
def test_kernels_of_flex_attention_compute_attention_and_its_gradients(name, bound):
    for differences in _run("values", (name,), "h100", (256, 200))[name]:
        assert set(differences) == {"mixed", "d_query", "d_key", "d_value"}
        assert max(differences.values()) < bound, differences


@pytest.mark.parametrize("name", FUSED)
def test_kernels_of_formulas_compute_them(name):
    (differences,) = _run("values", FUSED, "h100", (16,))[name]
    # Results are rounded to bfloat16, of 8 bits, and so are some terms.
    assert differences and max(differences.values()) < 1e-2, differences


def test_faults_are_found():
    case, lengths = ("flex_14b_bfloat16",), (512, 640)
    for fault, gpu, says in (("spill", "b200", "spill_bytes"), ("shared", "h100", "shared_bytes")):
        builds = [Build(**values) for values in _run("builds", case, gpu, lengths, "--plant", fault)[case[0]]["builds"]]
        with pytest.raises(AssertionError, match=says):
            _check(builds[-1:], gpu)
    assert _run("builds", case, "h100", lengths, "--plant", "lengths")[case[0]]["num_graphs"] > 1
    (differences,) = _run("values", ("flex_small_float16",), "h100", (256,), "--plant", "scale")["flex_small_float16"]
    assert min(differences.values()) > 1e-2
