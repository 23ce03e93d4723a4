"""Gradients of DeepSpeed's bfloat16 optimiser (ZeRO-1), of which every replica receives the sum of its own part alone.

That optimiser accumulates gradients in float32, in one flat buffer per group of parameters, and steps on this rank's
part of it. By itself the engine would sum the whole buffer on all ranks, in any dtype with twice the traffic of what is
used. Here the parts are reduce-scattered, and the norm of the whole gradient is summed over the parts of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from bitdance_scale.parallel.topology import Topology


class ScatteredGradients:
    """Takes over the sums over replicas of an optimiser, and what it computes its norm of.

    After `reduce` a rank's buffers hold sums in its own part only.

    Args:
        optimizer: DeepSpeed's `BF16_Optimizer`, without experts.
        topology: the ranks.
        dtype: in which parts are sent and summed; the buffers stay in float32.
    """

    # Any, because the optimiser's class is DeepSpeed's.
    def __init__(self, optimizer: Any, topology: Topology, dtype: torch.dtype) -> None:
        self._optimizer, self._topology, self._dtype = optimizer, topology, dtype
        optimizer.get_grads_for_norm = self._for_norm
        # It sums squares over the group that its `mpu` names, which is this object.
        optimizer.mpu = self

    def reduce(self) -> None:
        """Replaces this rank's part of the accumulated gradients by its mean over the replicas."""
        if self._topology.data_size == 1:
            return
        for whole, part in zip(self._wholes, self._parts, strict=True):
            if self._dtype is whole.dtype:
                # In place: the part lies where the rank's result belongs.
                dist.reduce_scatter_tensor(part, whole, group=self._topology.data_group)
            else:
                received = torch.empty_like(part, dtype=self._dtype)
                dist.reduce_scatter_tensor(received, whole.to(self._dtype), group=self._topology.data_group)
                part.copy_(received)
            part.div_(self._topology.data_size)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: those of a replica hold parts of the model, the replicas parts of their gradients."""
        assert dist.group.WORLD is not None, "a job"
        return dist.group.WORLD

    @property
    def _wholes(self) -> list[torch.Tensor]:
        """Float32 buffers of all gradients of this rank's parameters."""
        return list(self._optimizer.fp32_groups_gradients_flat)

    @property
    def _parts(self) -> list[torch.Tensor]:
        """This rank's parts of them, views."""
        return list(self._optimizer.fp32_groups_gradient_flat_partition)

    def _for_norm(self, for_clipping: bool = False) -> list[torch.Tensor] | tuple[list[torch.Tensor], dict[str, Any]]:
        """What DeepSpeed clips; or (what it sums the squares of, the same of experts)."""
        if for_clipping:
            return self._parts
        counted = []
        for parameters, part in zip(self._optimizer.bf16_groups, self._parts, strict=True):
            for parameter in parameters:
                # A replicated parameter has the same gradient on all tensor-parallel ranks.
                if parameter._hp_mapping is not None and (self._topology.tensor_rank == 0 or _is_split(parameter)):
                    address = parameter._hp_mapping.get_hp_fragment_address()
                    counted.append(part.narrow(0, address.start, address.numel))
        # DeepSpeed stacks the norms: of none it could not.
        return counted or [part.new_zeros(1) for part in self._parts[:1]], {}


def _is_split(parameter: torch.Tensor) -> bool:
    """Whether tensor-parallel ranks hold different parts of a parameter (`parallel/parameter_names.py`)."""
    return bool(getattr(parameter, "tensor_model_parallel", False))
