"""Kernels that are compiled for CUDA: built for an H100 and a B200 that are not there, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from tests.fake_cuda.device import B200, H100
from tests.fake_cuda.server import in_parallel
from tests.fake_cuda.triton_builds import Build
from tests.fake_cuda.triton_runs import (
    FLEX,
    FUSED,
    GPUS,
    NARROW,
    POSITIONS,
    RAGGED,
    TIMEOUT_S,
    WHOLE,
    builds,
    least_spilling,
    run,
    why_no_triton,
)

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.usefixtures("fake_cuda"),
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton())),
]

SHARED_BYTES = {"h100": H100.shared_memory_per_block_optin, "b200": B200.shared_memory_per_block_optin}
MATRIX_INSTRUCTIONS = {"h100": "wgmma.mma_async", "b200": "tcgen05.mma"}
MAX_SPILL_BYTES = 512
"""What a thread may store and load for want of registers, all instructions of a kernel that do so together.

The backward pass of attention at 128 channels takes all 255 registers on both GPUs with the blocks for which Inductor's
templates are tuned: 328 bytes were counted on the H100 and 504 on the B200, 63 numbers stored and loaded again. More
than that would have another cause, and is to be looked into.
"""
MAX_RAGGED_SPILL_BYTES = 1152
"""The same where packs end in a ragged tile: checks for the end take more registers (1,028 and 940 bytes were counted).

The loader pads packs to whole tiles (`data.pack_multiple`), so that a run has no such pack unless it is told to.
"""


def check(choices: Sequence[Build], gpu: str, most_bytes: int = MAX_SPILL_BYTES) -> None:
    """No configuration of a kernel needs more memory than there is, and one that Inductor would measure runs well."""
    assert all(build.shared_bytes <= SHARED_BYTES[gpu] for build in choices), choices
    assert least_spilling(list(choices)).spill_bytes <= most_bytes, choices


def checked(cases: tuple[str, ...], case: str, gpu: str, lengths: tuple[int, ...]) -> dict[str, list[Build]]:
    """Builds of the kernels of a case, which is compiled once and launches all of them for every length."""
    # Those of the other GPU are tested next.
    in_parallel([partial(run, "builds", cases, each, lengths) for each in GPUS])
    kernels = builds(cases, gpu, lengths)[case]
    most_bytes = MAX_RAGGED_SPILL_BYTES if lengths == RAGGED else MAX_SPILL_BYTES
    for choices in kernels.values():
        check(choices, gpu, most_bytes)
    result = run("builds", cases, gpu, lengths)[case]
    assert result["num_graphs"] == 1
    first, *others = result["launched"]
    assert kernels and set(first) == set(kernels) and others == [first] * (len(lengths) - 1)
    return kernels


# Packs end with a whole tile or with a ragged one; each has a kernel of its own.
@pytest.mark.parametrize(("cases", "lengths"), [(FLEX, WHOLE), (FLEX[:1], RAGGED)], ids=["whole", "ragged"])
@pytest.mark.parametrize("gpu", GPUS)
def test_flex_attention_is_built_once_for_all_lengths(gpu, cases, lengths):
    for case in cases:
        kernels = checked(cases, case, gpu, lengths)
        forward, _, backward = kernels
        assert "flex_attention" in forward and "flex_attention_backward" in backward
        if case.endswith("bfloat16"):
            for build in kernels[forward] + kernels[backward]:
                assert build.matrix_instructions.get(MATRIX_INSTRUCTIONS[gpu], 0) > 0, build


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("gpu", GPUS)
def test_formulas_are_built_once_for_all_lengths(gpu, name):
    checked(FUSED, name, gpu, POSITIONS)


@pytest.mark.parametrize(
    ("name", "bound"),
    # float16 has 11 bits, and inputs have as many on both sides: roundings of probabilities and results differ. The
    # kernels for it have the blocks of those for bfloat16, which the interpreter cannot multiply.
    [("flex_small_float32", 1e-5), ("flex_small_float16", 1e-3)],
)
def test_kernels_of_flex_attention_compute_attention_and_its_gradients(name, bound):
    for differences in run("values", (name,), "h100", (256, 200))[name]:
        assert set(differences) == {"mixed", "d_query", "d_key", "d_value"}
        assert max(differences.values()) < bound, differences


@pytest.mark.parametrize("name", NARROW)
def test_kernels_of_formulas_compute_them(name):
    (differences,) = run("values", NARROW, "h100", (32,))[name]
    # Results are rounded to bfloat16, of 8 bits, and so are some terms.
    assert differences and max(differences.values()) < 1e-2, differences


CASE, LENGTHS = ("flex_14b_bfloat16",), (512, 640)


@pytest.mark.parametrize(
    ("fault", "gpu", "says"), [("spill", "b200", "spill_bytes"), ("shared", "h100", "shared_byte")]
)
def test_a_kernel_that_needs_too_much_is_found(fault, gpu, says):
    (kernels,) = builds(CASE, gpu, LENGTHS, fault).values()
    with pytest.raises(AssertionError, match=says):
        for choices in kernels.values():
            check(choices, gpu)


def test_a_compilation_for_every_length_is_found():
    assert run("builds", ("gated_add",), "h100", LENGTHS, "lengths")["gated_add"]["num_graphs"] > 1


def test_a_wrong_value_is_found():
    (differences,) = run("values", ("flex_small_float16",), "h100", (256,), "scale")["flex_small_float16"]
    assert min(differences.values()) > 1e-2, differences
