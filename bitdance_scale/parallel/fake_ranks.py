"""One process that acts as any rank of a job of any size: collectives do nothing, and tensors hold nothing.

PyTorch's "fake" process-group backend answers every collective at once, and `FakeTensorMode` gives every tensor its
shape, dtype and storage size without memory. Stages, engines and schedules run on them unchanged, so that what they
would allocate on a rank can be logged. The numbers that engines read do not exist; `StorageLog` answers for them.

The process groups are global to the process: `parallel/memory_estimate.py` gives every such rank its own process.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.parallel import replicated, weight_gradients
from bitdance_scale.parallel.storage_log import StorageLog
from bitdance_scale.parallel.topology import Topology, make_topology


def join_fake_job(world_size: int, rank: int, section: ParallelSection) -> Topology:
    """Makes this process rank `rank` of a job of `world_size` ranks that do not exist; it must not be in a job yet."""
    # Registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # DeepSpeed insists on the variables that a launcher sets.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="1")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    return make_topology(section)


@contextlib.contextmanager
def no_memory(device_type: str = "") -> Iterator[StorageLog]:
    """Within it tensors take no memory and are logged.

    Args:
        device_type: of the tensors that are logged; empty: of all.
    """
    # Registers the collectives of fake tensors.
    import torch.distributed._tools.fake_collectives  # noqa: F401  (imported for the side effect)

    _register_coalesced()
    log = StorageLog(device_type)
    with (
        mock.patch.object(nn.Module, "_apply", _convert),
        mock.patch.object(replicated, "DistributedDataParallel", functools.partial(Buckets, log)),
        FakeTensorMode(allow_non_fake_inputs=True),
        log,
    ):
        yield log


@functools.cache
def _register_coalesced() -> torch.library.Library:
    """Registers what PyTorch leaves out of the collectives of fake tensors: those of several tensors at once.

    They write into tensors that they are given, and return what is waited for.
    """

    def answer(*_values: object, **_options: object) -> torch.ScriptObject:
        return FakeWork().boxed()

    library = torch.library.Library("c10d", "IMPL")
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_"):
        library.impl(name, answer, "Meta")
    return library


class Buckets(nn.Module):
    """What DistributedDataParallel does with gradients that are views of its buckets, on fake tensors.

    The buckets hold the gradients of all parameters that are trained, from the start to the end. Autograd makes a
    gradient elsewhere, which is copied into its bucket as soon as it is there.

    Args:
        log: where the buckets are logged as gradients.
        module: the network.
        gradient_as_bucket_view: True.
    """

    def __init__(self, log: StorageLog, module: nn.Module, *, gradient_as_bucket_view: bool) -> None:
        super().__init__()
        assert gradient_as_bucket_view, "otherwise a second copy of the gradients stays"
        self.module = module
        self._log = log
        for parameter in module.parameters():
            if parameter.requires_grad:
                # In reality several parameters share a bucket, which changes no sum.
                view = torch.zeros_like(parameter)
                log.assign([view], "gradients")
                parameter.register_post_accumulate_grad_hook(functools.partial(self._copy, view))

    def forward(self, *inputs: torch.Tensor | None) -> object:
        """What the network returns."""
        return self.module(*inputs)

    def _copy(self, view: torch.Tensor, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None, "a hook that runs after the gradient is accumulated"
        self._log.assign([parameter.grad], "gradients")
        view.copy_(parameter.grad)
        parameter.grad = view


@contextlib.contextmanager
def products_of_cuda() -> Iterator[None]:
    """Within it weight gradients on the CPU are added to float32 sums as on CUDA, without a product beside the sum."""
    with mock.patch.object(weight_gradients, "adds_in_float32", lambda _: True):
        yield


@contextlib.contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """Within it autocast on the CPU gives the dtypes, and keeps the copies, that it does on CUDA.

    Of the operations of the networks here the two differ in one: on CUDA a group norm is computed in float32, on a
    contiguous copy.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("group_norm", _group_norm_of_cuda, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _group_norm_of_cuda(
    hidden: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return torch.group_norm(hidden.float().contiguous(), num_groups, weight, bias, eps, cudnn_enabled)


def _convert(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Converts in place, as `Module.to` does with real tensors; PyTorch would try to swap fake ones, and fail."""
    if recurse:
        for child in module.children():
            _convert(child, convert)
    for parameter in module.parameters(recurse=False):
        with torch.no_grad():
            parameter.data = convert(parameter.data)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, convert(buffer))
    return module
