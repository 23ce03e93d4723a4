"""A tied embedding under a pipeline: one weight that is used on two ranks.

The first stage embeds with it, the last projects to the vocabulary with it. The first stage owns it: its engine holds
the only master, moments and gradient, and a checkpoint stores it once. The last stage computes with a copy, which is
refreshed before every use, and sends the copy's gradient back before gradients are reduced. Two owners that make the
same steps would drift apart by rounding, since the two stages may sum over data-parallel ranks in different orders.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from bitdance_scale.parallel.pipeline_stages import Stage
from bitdance_scale.parallel.topology import Topology


class TiedEmbedding:
    """Moves the tied weight and its gradient between the ends of the pipeline; on other ranks it does nothing.

    Args:
        stages: the stages of this rank.
        topology: the ranks.
    """

    def __init__(self, stages: Sequence[Stage], topology: Topology) -> None:
        self._topology = topology
        self._owner: nn.Parameter | None = None
        self._copy: nn.Parameter | None = None
        if topology.ends_group is None:
            return
        if stages[0].is_first:
            self._owner = stages[0].embedding.weight
            return
        self._copy = stages[-1].output.weight
        if self._copy.requires_grad:
            # Summed over micro-batches in float32, as the engine sums the other gradients.
            self._gradient = torch.zeros_like(self._copy, dtype=torch.float32)
            self._copy.register_post_accumulate_grad_hook(self._take_gradient)

    @torch.no_grad()
    def share_weight(self) -> None:
        """Refreshes the copy from the weight; call it before every step, evaluation and decoding."""
        weight = self._owner if self._owner is not None else self._copy
        if weight is not None:
            dist.broadcast(weight.data, self._topology.first_stage_rank, group=self._topology.ends_group)

    def return_gradient(self) -> None:
        """Adds the gradient of the copy to that of the weight, through autograd, so that the engine's hooks see it.

        Of a frozen weight there is none.
        """
        weight = self._owner if self._owner is not None else self._copy
        if weight is None or not weight.requires_grad:
            return
        if self._copy is not None:
            dist.send(self._gradient, self._topology.first_stage_rank, group=self._topology.ends_group)
            self._gradient.zero_()
        elif self._owner is not None:
            received = torch.empty_like(self._owner, dtype=torch.float32)
            dist.recv(received, self._topology.last_stage_rank, group=self._topology.ends_group)
            self._owner.backward(received.to(self._owner.dtype))

    def _take_gradient(self, copy: torch.Tensor) -> None:
        assert copy.grad is not None, "a hook that runs after the gradient is accumulated"
        self._gradient += copy.grad
        copy.grad = None
