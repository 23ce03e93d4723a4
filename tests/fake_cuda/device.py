"""A fake CUDA device: the library of `device.cpp`, and answers to what programs ask `torch.cuda`.

The library must be preloaded, so a program that uses the device is a process of its own (`server.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_SOURCE = Path(__file__).with_name("device.cpp")
ROOT = Path(__file__).resolve().parents[2]
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    is_integrated=False,
    gcnArchName="",
)
"""What an H100 says of itself."""
B200 = SimpleNamespace(
    **vars(H100)
    | {
        "name": "NVIDIA B200",
        "major": 10,
        "multi_processor_count": 148,
        "total_memory": 180 << 30,
        "L2_cache_size": 126 << 20,
    }
)
"""What a B200 says of itself; a block may have as much shared memory as on an H100."""


def why_not() -> str | None:
    """Why there can be no fake device here; None if there can."""
    if torch.version.cuda is not None:
        return "this PyTorch has CUDA"
    if sys.platform != "linux":
        return "needs Linux, whose loader takes LD_PRELOAD"
    if shutil.which("g++") is None:
        return "needs g++"
    if not (Path(torch.__file__).parent / "include/ATen/detail/CUDAHooksInterface.h").exists():
        return "needs the headers of PyTorch, which this installation lacks"
    return None


def build() -> Path:
    """The library, built once per version of PyTorch and of the source.

    Raises:
        RuntimeError: the compiler fails; with what it says.
    """
    key = hashlib.sha256(f"{torch.__version__}\n{torch.__file__}\n".encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"bitdance_fake_cuda_{os.getuid()}" / f"device_{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(mode=0o700, exist_ok=True)
    home = Path(torch.__file__).parent
    # Threads and processes may build it at once.
    handle, name = tempfile.mkstemp(dir=library.parent)
    os.close(handle)
    building = Path(name)
    link = (f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10")
    flags = ("-std=c++20", "-O1", "-fPIC", "-shared", f"-I{home}/include", *link)
    done = subprocess.run(
        ["g++", str(_SOURCE), *flags, "-o", str(building)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"g++ cannot build the fake device:\n{done.stderr[-4000:]}")
    building.replace(library)
    return library


def environment(has_device: bool, variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """How a process of this project is started, with the fake device or without: arguments of `subprocess`.

    Args:
        has_device: whether it has the device.
        variables: of its environment, beside those that the device needs.
    """
    chosen = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if has_device:
        chosen |= {"LD_PRELOAD": str(build()), "DS_ACCELERATOR": "cuda"}
    return {"cwd": ROOT, "env": os.environ | chosen | variables}


def start(
    module: str, arguments: Sequence[str], timeout_s: float, variables: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Runs a module of this project in a process with the fake device; returns what it prints.

    Args:
        module: its name.
        arguments: of its command line.
        timeout_s: after which it is ended.
        variables: of its environment, beside those that the device needs.

    Raises:
        RuntimeError: it fails, or does not end in time; with the end of its output.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=timeout_s,
            **environment(True, variables),
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{module} {' '.join(arguments)}: still runs after {timeout_s:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


class _Stream:
    """A stream on which nothing runs."""

    device = torch.device("cuda:0")
    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def wait_event(self, _: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        raise AssertionError("replaced by `cuda_device`")


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        raise AssertionError("replaced by `cuda_device`")


class PinnedMemory:
    """Which storages are in pinned memory, as long as they live: another may then have the address."""

    def __init__(self) -> None:
        self._kept: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """The storage of a tensor is pinned."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._kept[key] = weakref.ref(storage, lambda _: self._kept.pop(key, None))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._kept


@contextlib.contextmanager
def cuda_device(on_wait: Callable[[str], None], pinned: PinnedMemory, gpu: SimpleNamespace = H100) -> Iterator[None]:
    """Within it `torch.cuda` answers as with one GPU, and tensors can be made on it under `FakeTensorMode`.

    Args:
        on_wait: called with the name of every call that waits for the device.
        pinned: gets the storages that are pinned.
        gpu: what the GPU says of itself.
    """
    # Its tables name functions of torch.cuda, and two names must not be one function.
    import torch._dynamo
    import torch.cuda.random

    def pin(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        # A new tensor, as in reality; a fake one, whose only value is not known: copies of a value would be computed.
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        pinned.add(copy)
        return copy

    def nothing(*_: Any, **__: Any) -> None:
        pass

    class Chosen:
        """`torch.cuda.device`."""

        def __init__(self, _: Any) -> None:
            pass

        __enter__ = __exit__ = nothing

    zero = {name: lambda *_: 0 for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")}
    zero |= {name: lambda *_: 0 for name in ("max_memory_reserved", "memory_cached", "max_memory_cached")}
    answers: dict[str, Any] = {
        **zero,
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "init": nothing,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": Chosen,
        "get_device_properties": lambda *_: gpu,
        "get_device_capability": lambda *_: (gpu.major, gpu.minor),
        "get_device_name": lambda *_: gpu.name,
        "mem_get_info": lambda *_: (gpu.total_memory, gpu.total_memory),
        "memory_stats": lambda *_: {},
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: on_wait("torch.cuda.synchronize"),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": list,
    }
    with contextlib.ExitStack() as replaced:
        for name, answer in answers.items():
            replaced.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(torch.cuda.random, name):
                replaced.enter_context(mock.patch.object(torch.cuda.random, name, answer))
        for kind in (_Stream, _Event):
            wait = f"torch.cuda.{kind.__name__[1:]}.synchronize"
            replaced.enter_context(mock.patch.object(kind, "synchronize", lambda self, wait=wait: on_wait(wait)))
        replaced.enter_context(mock.patch.object(torch.cuda.nvtx, "range_push", nothing))
        replaced.enter_context(mock.patch.object(torch.cuda.nvtx, "range_pop", nothing))
        replaced.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin))
        replaced.enter_context(mock.patch.object(torch.Tensor, "record_stream", nothing))
        replaced.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", nothing))
        yield


@contextlib.contextmanager
def tensors_on_the_device(on_literal: Callable[[torch.Tensor, Any], None]) -> Iterator[None]:
    """Within it tensors can be made in two ways that a build without CUDA does not know.

    `torch.tensor(values, device="cuda")` is made on the CPU and moved, and the number of a device is one of CUDA's.
    Entered when all is imported, because libraries compile functions that call `torch.tensor`.

    Args:
        on_literal: called with every tensor that is made of numbers on the device, and the numbers.
    """
    make = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **_: Any) -> Any:
        made = make(data, dtype=dtype, device="cpu")
        where = torch.get_default_device() if device is None else torch.device(device)
        if where.type != "cpu":
            # Of a tensor whose values are known, the copy would be computed, on the device.
            made = torch.empty(made.shape, dtype=made.dtype, device=where)
            on_literal(made, data)
        return made.requires_grad_(requires_grad) if requires_grad else made

    def new_tensor(self: torch.Tensor, data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        return tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    with (
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(torch.Tensor, "new_tensor", new_tensor),
        _NumberedDevices(),
    ):
        yield


class _NumberedDevices(TorchFunctionMode):
    """Makes `device=0` mean "cuda:0"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if type(kwargs.get("device")) is int:
            kwargs = kwargs | {"device": torch.device("cuda", kwargs["device"])}
        return func(*args, **kwargs)
