"""A network that every rank has whole, trained data-parallel; its optimiser state is divided among ranks (ZeRO-1).

For networks that fit one device, such as the visual tokenizer. PyTorch's DistributedDataParallel reduces the gradients
while the backward pass runs, and its ZeroRedundancyOptimizer gives every parameter to one rank, which keeps its moments
and its averaged weights, steps it and sends it to the others. AdamW works element by element, so that a run on any
number of ranks, divided or not, takes the same steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from bitdance_scale.parallel.averaged_weights import AveragedWeights
from bitdance_scale.parallel.partition import Placement, ShardedValue, whole_pieces

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


class _Summed(torch.autograd.Function):
    """The sum of a tensor over all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Sums; every rank's result depends on every rank's tensor."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """The sum of what the ranks' losses say of the result."""
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, whose gradient is the sum of the ranks' gradients; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    total: torch.Tensor = _Summed.apply(tensor)
    return total


class ReplicatedNetwork:
    """A network under data parallelism, with its optimiser.

    A loss that is differentiated is a rank's part of the global one: gradients are summed over the ranks.

    Args:
        module: the network, float32, on its device; parameters without gradient are left alone.
        root: the part of it whose parameters are trained, which their names in a checkpoint begin from; None: all.
        prefix: what its parameters' names begin with in a checkpoint.
        betas: Adam's decays.
        weight_decay: decoupled weight decay.
        average_decay: decay of the averaged weights; 0: there are none.
        is_divided: whether the optimiser's state is divided among the ranks. It is whole on every rank where there are
            fewer parameters than ranks.

    Attributes:
        num_ranks: ranks that share the batch.
        num_updates: steps that the optimiser has taken.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        root: nn.Module | None = None,
        prefix: str = "",
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        average_decay: float = 0.0,
        is_divided: bool = True,
    ) -> None:
        self._root, self._prefix = root or module, prefix
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._trained = [parameter for parameter in self._root.parameters() if parameter.requires_grad]
        self._is_divided = is_divided and 1 < self.num_ranks <= len(self._trained)
        self._forward: nn.Module = module
        if self.num_ranks > 1:
            self._forward = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self._optimizer: torch.optim.Optimizer
        if self._is_divided:
            divided = ZeroRedundancyOptimizer(
                self._trained, torch.optim.AdamW, lr=0.0, betas=betas, weight_decay=weight_decay
            )
            self._optimizer, self._adam = divided, divided.optim
        else:
            self._optimizer = self._adam = torch.optim.AdamW(
                self._trained, lr=0.0, betas=betas, weight_decay=weight_decay
            )
        self._owned = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        self._owners = self._find_owners()
        self._averages = AveragedWeights(self._owned, average_decay) if average_decay else None
        self.num_updates = 0

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        """What the module returns, under the hooks that reduce its gradients; the last ones are cleared."""
        # Here and not before the backward pass: they would stand beside all activations.
        for parameter in self._trained:
            parameter.grad = None
        return self._forward(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the sum of the ranks' parts of a loss, of a forward pass just made."""
        # The ranks' gradients are averaged, which is undone here.
        (loss * self.num_ranks).backward()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips the gradient; returns its norm before, the same number on all ranks."""
        return nn.utils.clip_grad_norm_(self._trained, max_norm)

    def step(self, lr: float) -> None:
        """Takes a step of the optimiser and of the averages."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        if self._averages is not None:
            self._averages.update()
        self.num_updates += 1

    @contextlib.contextmanager
    def with_averages(self) -> Iterator[None]:
        """Within it the network has its averaged weights; a collective at both ends."""
        assert self._averages is not None, "averaged weights need `optim.average_decay`"
        with self._averages.in_place_of_masters(self._send):
            yield

    def restart_averages(self) -> None:
        """Begins the averages again with the weights as they are."""
        if self._averages is not None:
            self._averages.restart()

    def model_values(self) -> Mapping[str, ShardedValue]:
        """The parameters, whole on every rank."""
        return {name: _whole(parameter) for name, parameter in self._named()}

    def optimizer_values(self) -> Mapping[str, ShardedValue]:
        """Moments and averages of the parameters that this rank steps; of the others no piece."""
        values: dict[str, ShardedValue] = {}
        owned = set(self._owned)
        for name, parameter in self._named():
            if not parameter.requires_grad:
                continue
            if self._averages is not None:
                average = self._averages.of(parameter) if parameter in owned else None
                values[f"{AVERAGE}.{name}"] = _part(parameter, average)
            moments = self._moments(parameter) if parameter in owned else {}
            values |= {f"{kind}.{name}": _part(parameter, moments.get(kind)) for kind in MOMENTS}
        return values

    def restore(self, num_updates: int) -> None:
        """Says how many steps the optimiser has taken, after its moments were loaded."""
        self.num_updates = num_updates
        for parameter in self._owned:
            self._moments(parameter)
            self._adam.state[parameter]["step"].fill_(num_updates)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._root.named_parameters():
            yield self._prefix + name, parameter

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's state of a parameter, made if no step was taken yet."""
        state: dict[str, torch.Tensor] = self._adam.state[parameter]
        if not state:
            state |= {"step": torch.zeros(())} | {kind: torch.zeros_like(parameter) for kind in MOMENTS}
        return state

    def _find_owners(self) -> Sequence[int]:
        """The rank that steps each parameter."""
        if not self._is_divided:
            return ()
        owned = set(self._owned)
        rank = dist.get_rank()
        flags = [rank if parameter in owned else 0 for parameter in self._trained]
        owners = torch.tensor(flags, device=self._trained[0].device)
        dist.all_reduce(owners)
        result: list[int] = owners.tolist()
        return result

    def _send(self) -> None:
        """Sends every parameter from the rank that steps it to the others."""
        for parameter, owner in zip(self._trained, self._owners, strict=bool(self._owners)):
            dist.broadcast(parameter.data, src=owner)


def fullest_share(sizes: Sequence[int], num_ranks: int) -> int:
    """The rank that ZeroRedundancyOptimizer gives the most elements of parameters of these sizes, given in order.

    It gives each parameter, the largest first, to the rank that has the least.
    """
    shares = [0] * num_ranks
    for size in sorted(sizes, reverse=True):
        shares[shares.index(min(shares))] += size
    return shares.index(max(shares))


def _whole(parameter: torch.Tensor) -> ShardedValue:
    return whole_pieces(parameter.data, Placement.replicated(tuple(parameter.shape)))


def _part(parameter: torch.Tensor, held: torch.Tensor | None) -> ShardedValue:
    if held is None:
        return ShardedValue(tuple(parameter.shape), parameter.dtype, ())
    return whole_pieces(held, Placement.replicated(tuple(parameter.shape)))
