"""The Triton kernels that `torch.compile` generates for a fake CUDA device, and their launches.

Nothing is built for the device and nothing runs on it. Tensors on it have values all the same, in memory of the CPU:
the code around the kernels runs there, and the kernels themselves are left out or run by Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tests.fake_cuda.device import H100, PinnedMemory, cuda_device


class DeviceMemory:
    """Values of fake tensors, in memory of the CPU; tensors that share memory here share it there."""

    def __init__(self) -> None:
        # Storage of a fake tensor -> memory, and address of memory -> fake tensor over all of it. The tensors are kept,
        # so that no address is used twice.
        self._memory: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}
        self._whole: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def on_device(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor on the device with the values, shape and strides of one on the CPU; its memory is that one's."""
        storage = value.untyped_storage()
        key = (storage.data_ptr(), value.dtype)
        if key not in self._whole:
            size = storage.nbytes() // value.element_size()
            self._whole[key] = torch.empty(size, dtype=value.dtype, device="cuda:0")
            self._memory[self._whole[key].untyped_storage()._cdata] = (self._whole[key], storage)
        with torch.no_grad():
            return self._whole[key].as_strided(value.size(), value.stride(), value.storage_offset()).detach()

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor on the device.

        Raises:
            KeyError: it has none, because an operator made it that was not compiled.
        """
        _, storage = self._memory[tensor.untyped_storage()._cdata]
        with unset_fake_temporarily(), torch.no_grad():
            values = torch.empty(0, dtype=tensor.dtype)
            return values.set_(storage, int(tensor.storage_offset()), _sizes(tensor.size()), _sizes(tensor.stride()))

    def array_on_device(self, array: np.ndarray, _: torch.device) -> torch.Tensor:
        """In place of `attention.to_device`."""
        with unset_fake_temporarily():
            value = torch.from_numpy(array.copy())
        return self.on_device(value)


def _sizes(numbers: Any) -> tuple[int, ...]:
    return tuple(map(int, numbers))


@dataclass
class Compilation:
    """What was compiled and launched so far.

    Attributes:
        kernels: of all graphs, as Inductor's launchers with the configurations that it would try.
        launched: names of kernels, in order.
        memory: values of tensors on the device.
        mode: under which tensors are on the device.
    """

    kernels: list[Any] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    memory: DeviceMemory = field(default_factory=DeviceMemory)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    @property
    def num_graphs(self) -> int:
        """Graphs that were compiled in this process."""
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]


class _Launcher:
    """In place of a built kernel."""

    def __init__(self, kernel: Any, compilation: Compilation, is_interpreted: bool) -> None:
        self._kernel, self._compilation, self._is_interpreted = kernel, compilation, is_interpreted

    def run(self, *arguments: Any, stream: int) -> None:
        self._compilation.launched.append(self._kernel.fn.__name__)
        if self._is_interpreted:
            self._kernel.run(*arguments, stream=stream)


def _unwritten(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of a compiled graph; a number that no kernel writes is not a number."""
    memory = torch.empty_strided(size, stride, dtype=dtype)
    return memory.fill_(torch.nan) if dtype.is_floating_point else memory.zero_()


@contextlib.contextmanager
def compilation_for(gpu: SimpleNamespace = H100, is_interpreted: bool = False) -> Iterator[Compilation]:
    """Within it, `torch.compile` compiles for a GPU that does not exist; once per process, for one GPU.

    Args:
        gpu: what it says of itself.
        is_interpreted: whether kernels run, by Triton's interpreter; for it, TRITON_INTERPRET=1 must be in the
            environment before Python starts.
    """
    assert is_interpreted == (os.environ.get("TRITON_INTERPRET") == "1"), "Triton decides when it is imported"
    with contextlib.ExitStack() as replaced:
        replaced.enter_context(cuda_device(lambda _: None, PinnedMemory(), gpu))
        # After the answers of the device: what they import looks at it.
        import torch._inductor.config
        import triton
        from torch._dynamo.device_interface import CudaInterface
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.codecache import _load_triton_kernel_from_source
        from torch._inductor.output_code import CompiledFxGraph

        compilation = Compilation()
        call = CompiledFxGraph.__call__

        def launcher(_: Any, name: str, source: str, device_str: str = "cuda") -> _Launcher:
            kernel = _load_triton_kernel_from_source(name, source)
            if is_interpreted:
                # The interpreter has no libdevice; its own functions of the same names compute the same.
                kernel.fn.fn.__globals__["libdevice"] = triton.language.math
            compilation.kernels.append(kernel)
            return _Launcher(kernel, compilation, is_interpreted)

        def call_with_values(graph: Any, inputs: list[Any]) -> Any:
            memory = compilation.memory
            values = [memory.value(value) if isinstance(value, torch.Tensor) else value for value in inputs]
            inputs.clear()
            with unset_fake_temporarily():
                results = call(graph, values)
            return [memory.on_device(value) if isinstance(value, torch.Tensor) else value for value in results]

        def replace(place: Any, name: str, value: Any, create: bool = False) -> None:
            replaced.enter_context(mock.patch.object(place, name, value, create=create))

        settings = {
            "compile_threads": 1,
            "force_disable_caches": True,
            # Computes constants on the device. Without it they stand in the kernels, where they end up anyway.
            "joint_graph_constant_folding": False,
        }
        replaced.enter_context(torch._inductor.config.patch(settings))
        replace(AsyncCompile, "triton", launcher)
        replace(CompiledFxGraph, "__call__", call_with_values)
        # What it asks the device interface, it would ask functions of before.
        for name in ("current_device", "set_device", "device_count", "get_device_properties", "is_bf16_supported"):
            replace(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
        for place in (CudaInterface, torch.cuda):
            exchange = {"exchange_device", "maybe_exchange_device"}
            for name in exchange if place is CudaInterface else {f"_{name}" for name in exchange}:
                replace(place, name, staticmethod(lambda _: 0) if place is CudaInterface else lambda _: 0)
        replace(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True)
        replace(torch._C._dynamo.guards, "_empty_strided_cuda", _unwritten)
        # Tables of attention written out by hand, which is nowhere compiled, are made with tensors that have values.
        replaced.enter_context(mock.patch("torch._inductor.fx_passes.fuse_attention._sfdp_init", lambda *_: None))
        replaced.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None))
        replace(triton.runtime.driver, "_active", _Driver(gpu))
        yield compilation


class _Driver:
    """Triton's driver of a GPU that does not exist."""

    def __init__(self, gpu: SimpleNamespace) -> None:
        self._gpu = gpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self._gpu.major + self._gpu.minor, self._gpu.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda:0")
