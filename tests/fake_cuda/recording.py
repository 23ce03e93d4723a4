"""What a program does on a fake CUDA device: its kernels, collectives, and waits of the host for the device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_cuda.device import PinnedMemory

# Operators that only make another view, or storage without a kernel.
_NO_KERNEL = frozenset(
    (
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "as_strided",
        "split",
        "chunk",
        "narrow",
        "reshape",
        "unbind",
        "split_with_sizes",
        "unfold",
        "lift_fresh",
        "_reshape_alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "is_pinned",
        "set_",
        "device",
        "view_as_real",
        "view_as_complex",
        "real",
        "imag",
        "_local_scalar_dense",
    )
)
# Their results have sizes that depend on values.
_READS_VALUES = frozenset(("nonzero", "masked_select", "unique2", "_unique2", "unique_dim"))
# Kernels of products take operands of one dtype; fake ones take any.
_PRODUCTS = frozenset(("mm", "bmm", "addmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention"))
_PROJECT, _LIBRARIES = "bitdance_scale/", ("megatron/", "deepspeed/", "torch/optim")


@dataclass(frozen=True)
class Kernel:
    """A call of an operator that runs at least one kernel.

    Attributes:
        phase: of the program.
        name: of the operator.
        place: file, line and function that called it; "backward" where autograd did.
        num_bytes: of all tensors that it reads and writes, each once.
        flops: two per multiply-add of a product of matrices; 0 of others.
        devices: that its tensors are on, without the CPU's scalars.
        dtypes: of its floating-point tensors.
    """

    phase: str
    name: str
    place: str
    num_bytes: int
    flops: int
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Collective:
    """A call of a collective, or of a message to another rank.

    Attributes:
        phase: of the program.
        name: of the operation.
        ranks: global ranks of the group, in its order.
        shapes: of the tensors that this rank gives.
        dtype: of them.
        peer: global rank at the other end of a message, or that a broadcast comes from; -1 where there is none.
    """

    phase: str
    name: str
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    peer: int

    @property
    def num_bytes(self) -> int:
        """Of the tensors that this rank gives."""
        size = getattr(torch, self.dtype.removeprefix("torch.")).itemsize
        return size * sum(torch.Size(shape).numel() for shape in self.shapes)


@dataclass
class Record:
    """What was seen.

    Attributes:
        kernels: in order.
        collectives: in order.
        waits: by (phase, what, place), how often the host waited for the device.
    """

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)


class Recorder(TorchDispatchMode):
    """Records what operators do; enter it last, within `FakeTensorMode`.

    Args:
        pinned: what is in pinned memory.
    """

    # FlexAttention is such an operator.
    supports_higher_order_operators = True

    def __init__(self, pinned: PinnedMemory) -> None:
        super().__init__()
        self.record = Record()
        self._pinned = pinned
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within it is of this phase; outside of phases nothing is recorded."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        if self._phase:
            self.record.waits[self._phase, what, _place()] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._phase:
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        space, _, rest = str(func).partition(".")
        name = rest.partition(".")[0] if space in ("aten", "c10d") else str(func)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if space == "c10d":
            self._note_collective(name, args)
            return
        if space.startswith("prim"):
            return
        if "cuda" not in {tensor.device.type for tensor in (*inputs, *outputs)}:
            if kwargs.get("pin_memory"):
                self._pinned.add(outputs[0])
            return
        # Kernels that are told a dtype of the result add to it; their factors have one dtype too.
        operands = inputs[1:3] if rest in ("addmm.dtype", "addmm.dtype_out") else inputs
        dtypes = {tensor.dtype for tensor in operands if tensor.dtype.is_floating_point}
        if name in _PRODUCTS and len(dtypes) > 1:
            raise RuntimeError(f"{name} at {_place()}: operands of {', '.join(sorted(map(str, dtypes)))}")
        what = self._wait_of(name, args, kwargs, inputs)
        if what:
            self.record.waits[self._phase, what, _place()] += 1
        if name in _NO_KERNEL:
            return
        several = [tensor for tensor in (*inputs, *outputs) if tensor.dim() or tensor.device.type != "cpu"]
        self.record.kernels.append(
            Kernel(
                self._phase,
                name,
                _place(),
                _num_bytes(inputs, outputs),
                _flops(name, inputs),
                tuple(sorted({tensor.device.type for tensor in several})),
                tuple(sorted({str(tensor.dtype) for tensor in several if tensor.dtype.is_floating_point})),
            )
        )

    def _wait_of(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> str:
        """What makes the host wait in a call of an operator; empty if nothing does."""
        if name == "_local_scalar_dense":
            return "a number is read"
        if name in _READS_VALUES:
            return f"the size of {name}'s result"
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            return "the size of a boolean index's result"
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            where = args[0].device.type if name == "copy_" else str(kwargs.get("device") or source.device)
            ends = {source.device.type, torch.device(where).type}
            is_async = bool(kwargs.get("non_blocking")) or (name == "copy_" and len(args) > 2 and bool(args[2]))
            if ends == {"cpu", "cuda"}:
                # PyTorch pins the memory that it makes for a copy from the device that nobody waits for.
                on_host = source if source.device.type == "cpu" else args[0] if name == "copy_" else None
                if not (is_async and (on_host is None or on_host in self._pinned)):
                    return f"a copy from {source.device.type} to {torch.device(where).type}"
        return ""

    def _note_collective(self, name: str, args: tuple[Any, ...]) -> None:
        groups = [value for value in args if isinstance(value, torch.ScriptObject)]
        ranks: tuple[int, ...] = ()
        for value in groups:
            try:
                ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
                break
            except (RuntimeError, ValueError):
                continue
        given = _tensors(args[0])
        peer = -1
        if name in ("send", "recv_"):
            peer = ranks[int(args[2])]
        elif name == "broadcast_":
            peer = ranks[int(args[3])]
        shapes = tuple(tuple(int(size) for size in tensor.shape) for tensor in given)
        dtype = str(given[0].dtype) if given else "torch.uint8"
        self.record.collectives.append(Collective(self._phase, name, ranks, shapes, dtype, peer))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _num_bytes(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes that are read and written; what is changed in place is both."""
    # An expanded tensor is read where it is stored.
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs))


def _flops(name: str, inputs: list[torch.Tensor]) -> int:
    if name in ("mm", "bmm"):
        first, second = inputs[:2]
    elif name in ("addmm", "baddbmm"):
        first, second = inputs[1:3]
    else:
        return 0
    return 2 * first.numel() * int(second.shape[-1])


def _place() -> str:
    """The innermost frame in the project, or in the libraries that it drives; "backward" where autograd called."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("torch/autograd/graph.py"):
            return "backward"
        for part in (_PROJECT, *_LIBRARIES):
            at = name.rfind(part)
            if at >= 0 and "tests/fake_cuda" not in name:
                return f"{name[at:]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
