"""Builds of Triton kernels for a GPU that is not there: what Triton and NVIDIA's assembler say of them."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

_MATRIX_INSTRUCTION = re.compile(r"(?<=\s)(wgmma\.mma_async|tcgen05\.mma(?=\.)|mma\.sync)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Build:
    """A kernel in one configuration, built for one GPU.

    Attributes:
        kernel: its name.
        capability: of the GPU, 90 or 100.
        blocks: its sizes of blocks, as Inductor or the template names them.
        num_warps: of a block of threads.
        num_stages: of its pipelined loops.
        num_registers: of a thread.
        stack_bytes: of a thread's memory that is not registers.
        spill_bytes: that the instructions of a thread store for want of registers, and load; each is counted once,
            whether it is in a loop or not.
        shared_bytes: of a block of threads.
        num_tensor_columns: of tensor memory, which GPUs have from Blackwell on.
        matrix_instructions: kind -> number in the program.
        seconds: of the build.
    """

    kernel: str
    capability: int
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    num_registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    num_tensor_columns: int
    matrix_instructions: dict[str, int]
    seconds: float


def build_all(kernel: Any) -> list[Build]:
    """Builds every configuration of a kernel that Inductor would try, for the GPU that it was generated for.

    Args:
        kernel: Inductor's launcher.

    Raises:
        Exception: of Triton, where it cannot build it.
    """
    return [_build(kernel, config) for config in kernel.configs]


def _build(kernel: Any, config: Any) -> Build:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    properties = kernel.device_props
    meta = kernel._create_compile_meta(config)
    source = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
    target = GPUTarget(properties.type, properties.cc, properties.warp_size)
    log, begun = io.StringIO(), time.perf_counter()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        # What was built before has no log.
        triton.knobs.compilation.always_compile = True
        built = triton.compile(source, target=target, options=kernel._create_compile_options(config, meta))
    seconds = time.perf_counter() - begun
    spills, registers = _SPILLS.search(log.getvalue()), _REGISTERS.search(log.getvalue())
    assert spills and registers, log.getvalue()
    stack, stores, loads = map(int, spills.groups())
    # A template has its own in its source.
    constants = {**meta["constants"], **kernel.inductor_meta.get("config_args", {})}
    return Build(
        kernel=kernel.fn.__name__,
        capability=properties.cc,
        blocks={name: value for name, value in sorted(constants.items()) if "BLOCK" in name and type(value) is int},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        num_registers=int(registers[1]),
        stack_bytes=stack,
        spill_bytes=stores + loads,
        shared_bytes=built.metadata.shared,
        num_tensor_columns=built.metadata.tmem_size or 0,
        matrix_instructions=dict(Counter(_MATRIX_INSTRUCTION.findall(built.asm["ptx"]))),
        seconds=seconds,
    )
