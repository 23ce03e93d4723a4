"""A log of every tensor storage made and freed while it is on: the memory of a program, event by event.

The log sees what PyTorch's dispatcher sees. Under `FakeTensorMode` nothing is allocated and only the log records what
would be. It never sees scratch space inside a kernel or a communication library.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# The maker of a storage is the innermost frame in one of these packages.
_MAKERS = ("bitdance_scale", "megatron", "deepspeed")
# DeepSpeed's replacement for `torch.nn.functional.linear` under ZeRO-3, and this project's for fake tensors;
# what they make are activations of their caller.
_TRANSPARENT = ("/deepspeed/runtime/zero/linear.py", "/bitdance_scale/parallel/fake_ranks.py")
_OPTIMIZER = "/torch/optim/"
_AUTOGRAD = "/torch/autograd/graph.py"


@dataclass(eq=False)
class Storage:
    """One storage.

    Attributes:
        nbytes: its size.
        maker: the function that made it, as `package/file.py function`; the operation, if autograd made it.
        role: what it is for; empty until it is assigned.
    """

    nbytes: int
    maker: str
    role: str = ""

    @property
    def is_engine_made(self) -> bool:
        """Whether DeepSpeed or the optimiser made it, rather than the model."""
        return self.maker.startswith(("deepspeed/", "torch/optim"))


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a stretch of the log.

    Attributes:
        total: bytes alive.
        by_role: bytes alive, by `Storage.role`.
        storages: the storages alive, the largest first.
    """

    total: int
    by_role: dict[str, int]
    storages: tuple[Storage, ...]


class StorageLog(TorchDispatchMode):
    """Logs the storages of what operations return; enter it inside a `FakeTensorMode`.

    Values do not exist under that mode, but engines read a few. Integers that the program itself wrote into a tensor
    (`torch.tensor([..])`) are remembered. Any other number reads as 1.0, or 0 for an integer or boolean.

    Args:
        device_type: of the storages that are logged; empty: all but those without a device ("meta").
    """

    # FlexAttention is such an operator; its fake results are those of its kernels.
    supports_higher_order_operators = True

    def __init__(self, device_type: str = "") -> None:
        super().__init__()
        self._device_type = device_type
        self.events: list[tuple[Storage, int]] = []
        self._alive: dict[int, tuple[Storage, weakref.ref]] = {}
        self._integers: dict[int, tuple[list[int], weakref.ref]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number(args[0])
        literal = None
        if func is torch.ops.aten.lift_fresh.default and type(args[0]) is torch.Tensor:
            literal = _integers_of(args[0])
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value, func)
        if literal is not None:
            self._keep(result, literal)
        return result

    def remember(self, tensor: torch.Tensor, values: Any) -> None:
        """Takes the values of an integer tensor, a number or a nested sequence, which the program may read back."""
        if tensor.dtype == torch.int64:
            self._keep(tensor, [int(value) for value in tree_leaves(values)])

    @property
    def position(self) -> int:
        """Number of events so far; a stretch of the log lies between two positions."""
        return len(self.events)

    def alive(self) -> list[Storage]:
        """The storages alive now."""
        return [storage for storage, _ in self._alive.values()]

    def assign(self, tensors: Iterable[torch.Tensor], role: str) -> None:
        """Sets what the storages of these tensors are for; a storage keeps the first role it is given."""
        for tensor in tensors:
            entry = self._alive.get(tensor.untyped_storage()._cdata)
            if entry is not None and not entry[0].role:
                entry[0].role = role

    def peak(self, start: int, stop: int) -> Peak:
        """The fullest moment, or the first of several, after the events number `start` to `stop` - 1."""
        live = sum(storage.nbytes * sign for storage, sign in self.events[:start])
        most, moment = live, start
        for number, (storage, sign) in enumerate(self.events[start:stop], start + 1):
            live += storage.nbytes * sign
            if live > most:
                most, moment = live, number
        count: Counter[Storage] = Counter()
        for storage, sign in self.events[:moment]:
            count[storage] += sign
        storages = sorted((storage for storage, number in count.items() if number), key=lambda item: -item.nbytes)
        by_role: Counter[str] = Counter()
        for storage in storages:
            by_role[storage.role] += storage.nbytes
        return Peak(most, dict(by_role), tuple(storages))

    def most_of(self, role: str, start: int) -> int:
        """The most bytes of one role that were alive at once since event number `start`."""
        live, most = 0, 0
        for number, (storage, sign) in enumerate(self.events):
            if storage.role == role:
                live += storage.nbytes * sign
                most = max(most, live) if number >= start else live
        return most

    def _see(self, tensor: torch.Tensor, func: object) -> None:
        # DeepSpeed keeps shapes as tensors on the meta device.
        if tensor.device.type == "meta" or (self._device_type and tensor.device.type != self._device_type):
            return
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        if key in self._alive or not untyped.nbytes():
            return
        storage = Storage(untyped.nbytes(), _maker(func))
        self._alive[key] = (storage, weakref.ref(untyped, lambda _: self._drop(key)))
        self.events.append((storage, 1))

    def _drop(self, key: int) -> None:
        storage, _ = self._alive.pop(key)
        self.events.append((storage, -1))

    def _number(self, tensor: torch.Tensor) -> float | int:
        if tensor.is_floating_point():
            return 1.0
        kept = self._integers.get(tensor.untyped_storage()._cdata)
        return 0 if kept is None else kept[0][tensor.storage_offset()]

    def _keep(self, tensor: torch.Tensor, integers: list[int]) -> None:
        # As long as the storage lives: another may then have its address.
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        self._integers[key] = (integers, weakref.ref(untyped, lambda _: self._integers.pop(key, None)))


def _integers_of(tensor: torch.Tensor) -> list[int] | None:
    """The values of a real int64 tensor, as a list: under the modes a tensor would lose them; None for other dtypes."""
    if tensor.dtype != torch.int64:
        return None
    with _disable_current_modes():
        return tensor.flatten().tolist()


def _maker(func: object) -> str:
    """The running function of this project or of an engine; for an operation of the backward pass, the operation."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(_AUTOGRAD):
            return f"{func} of the backward pass"
        if _OPTIMIZER in file:
            return f"torch/optim {frame.f_code.co_name}"
        if not file.endswith(_TRANSPARENT) and file != __file__:
            parts = Path(file).parts
            for package in _MAKERS:
                if package in parts:
                    start = len(parts) - 1 - parts[::-1].index(package)
                    return f"{'/'.join(parts[start:])} {frame.f_code.co_name}"
        frame = frame.f_back
    return str(func)
