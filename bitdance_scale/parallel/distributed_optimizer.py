"""Megatron-core's distributed optimiser over the data-parallel ranks: the only module that knows its buffers.

The weights of a stage lie in one buffer and their gradients in another, float32, both cut into buckets. Gradients add
up in the buffer. In the last micro-batch of a step each bucket is reduce-scattered in float32 as soon as all its
gradients are there, while the backward pass goes on. Every rank then steps AdamW on its shard of each bucket, and
sends its new weights to the others while the next forward pass begins.

The buffers and their hooks are Megatron-core's `DistributedDataParallel`. Its `DistributedOptimizer` is not used: it
takes CUDA tensors only, trains float32 weights in place of masters, and steps whole or not at all without asking. What
it adds is a table of which part of which parameter lies in a shard, and AdamW on it, which is what this module has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.averaged_weights import AveragedWeights
from bitdance_scale.parallel.engine import MOMENTS, Fragment, StepOutcome, TrainingEngine, decay_groups
from bitdance_scale.parallel.partial_gradients import leave_gradients_partial, sum_over_tensor_ranks
from bitdance_scale.parallel.partition import ShardedValue, whole_pieces
from bitdance_scale.parallel.pipeline_stages import RankStages, Stage
from bitdance_scale.parallel.topology import Topology

# Megatron-core's default: at least this many elements are reduced together, and a million per data-parallel rank.
MIN_BUCKET_ELEMENTS = 40_000_000
BUCKET_ELEMENTS_PER_RANK = 1_000_000
# As in DeepSpeed and PyTorch: keeps the factor of a clipped gradient finite.
_CLIP_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class _Shard:
    """This rank's part of a bucket; all tensors are flat and of one length, padding between parameters included.

    Attributes:
        weights: in training dtype; a view of the buffer of weights.
        gradients: float32; a view of the buffer of gradients.
        master, exp_avg, exp_avg_sq: float32.
    """

    weights: torch.Tensor
    gradients: torch.Tensor
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Part:
    """The range of a parameter that lies in this rank's shard of its bucket.

    Attributes:
        shard: the shard.
        offset: first element in the shard; where the parameter would begin, negative if it begins before the shard.
        start: first element in the flattened parameter.
        length: elements; 0: the range is elsewhere.
    """

    shard: _Shard
    offset: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The range in a tensor of the shard; a view."""
        return tensor.narrow(0, self.offset + self.start, self.length)


class MegatronEngine(TrainingEngine):
    """The stages of a pipeline rank under Megatron-core's distributed optimiser.

    Args:
        module: the stages, with their initial weights; their weights move into buffers.
        config: the run.
        topology: the ranks.
        is_fused: whether AdamW is one kernel without temporary tensors; None: only on CUDA.
    """

    def __init__(self, module: RankStages, config: RunConfig, topology: Topology, is_fused: bool | None = None) -> None:
        super().__init__(module, config, topology)
        # Gradients are summed over the replicas, not averaged.
        self.loss_factor = 1
        self._clip_norm = config.optim.clip_norm
        self._num_steps = 0
        partial = set(leave_gradients_partial(self.stages))
        self._partial = [name for name, located in self.trained.items() if located.parameter in partial]
        # Any: Megatron-core's attributes are not typed.
        self._chunks: list[Any] = [_with_buffers(stage, number, topology) for number, stage in enumerate(self.stages)]
        self._shards: list[_Shard] = []
        self._parts: dict[str, _Part] = {}
        self._make_shards()
        self._set_gathered()
        self._step_counts = torch.zeros(len(self._parts), dtype=torch.float32, device=topology.device)
        self._adam = self._make_adam(config, topology.device.type == "cuda" if is_fused is None else is_fused)
        decay = config.optim.average_decay
        self._averages = AveragedWeights([shard.master for shard in self._shards], decay) if decay else None

    def forward(self, inputs: PackInputs) -> torch.Tensor:
        """The model's forward pass under the engine's hooks, without a pipeline."""
        (chunk,) = self._chunks
        return chunk(inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Backpropagates one micro-batch; with the last one of a step gradients are reduced while it runs."""
        (chunk,) = self._chunks
        with contextlib.nullcontext() if is_last else chunk.no_sync():
            loss.backward()
        if is_last:
            self._finish_reduction()

    @contextlib.contextmanager
    def external_backward(self) -> Iterator[list[Stage]]:
        """Lends the stages to Megatron-core's schedule for a whole step.

        The schedule says with which backward pass of a stage its gradients are reduced.
        """
        if self.tied is not None:
            self.tied.share_weight()
        contexts = [chunk.no_sync for chunk in self._chunks]
        schedule = self.stages[0].config
        schedule.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
        try:
            yield self.stages
        finally:
            schedule.no_sync_func = None
        if self.tied is not None:
            # The bucket of the owner waits for this gradient: it counts as one more use of the weight.
            self.tied.return_gradient()
        self._finish_reduction()

    def step(self, lr: float, refuses: Callable[[float], bool] | None = None) -> StepOutcome:
        """As in `TrainingEngine`."""
        norm = self._gradient_norm()
        is_skipped = not math.isfinite(norm)
        is_refused = not is_skipped and refuses is not None and refuses(norm)
        if not (is_skipped or is_refused):
            self._clip(norm)
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self._num_steps += 1
            if self._averages is not None:
                self._averages.update()
            self._send_weights()
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        return StepOutcome(grad_norm=norm, is_skipped=is_skipped, is_refused=is_refused)

    def gradient(self, name: str) -> torch.Tensor:
        """As in `TrainingEngine`: float32, in the shape of the local parameter."""
        parameter = self.parameters[name].parameter
        part = self._parts[name]
        data_size, shard_size = self._topology.data_size, part.shard.gradients.numel()
        whole = torch.empty(data_size * shard_size, dtype=torch.float32, device=self._topology.device)
        dist.all_gather_into_tensor(whole, part.shard.gradients.clone(), group=self._topology.data_group)
        start = part.offset + self._topology.data_rank * shard_size
        return whole.narrow(0, start, parameter.numel()).view_as(parameter)

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """(global name, fragment) of each parameter that this rank keeps a part of."""
        for name, part in self._parts.items():
            if not part.length:
                continue
            shard = part.shard
            average = None if self._averages is None else part.of(self._averages.of(shard.master))
            yield (
                name,
                Fragment(part.start, part.of(shard.master), part.of(shard.exp_avg), part.of(shard.exp_avg_sq), average),
            )

    def model_values(self) -> dict[str, ShardedValue]:
        """As in `TrainingEngine`; the weights are whole on every replica."""
        if self._averages is not None:
            self._averages.refresh_stale(self._refresh_weights)
        self._wait_for_weights()
        return {
            name: whole_pieces(parameter.data, placement) for name, (parameter, placement) in self.parameters.items()
        }

    def holdings(self) -> dict[str, list[torch.Tensor]]:
        """As in `TrainingEngine`; the buffer of gradients stays."""
        buffers = [buffer for chunk in self._chunks for buffer in chunk.buffers]
        frozen = [located.parameter.data for name, located in self.parameters.items() if name not in self.trained]
        return {
            # Tables that are computed count as weights: they stay as long.
            "weights": [buffer.param_data for buffer in buffers]
            + frozen
            + [table for stage in self.stages for table in stage.buffers()],
            "gradients": [buffer.grad_data for buffer in buffers],
            "masters": [shard.master for shard in self._shards],
            "moments": [getattr(shard, key) for shard in self._shards for key in MOMENTS],
            "averages": [] if self._averages is None else list(self._averages.buffers),
            "buffers": [],
        }

    def optimizer_step(self) -> int:
        """Optimiser steps taken, which AdamW counts for its bias correction."""
        return self._num_steps

    def set_optimizer_step(self, step: int) -> None:
        """Restores the number of optimiser steps taken."""
        self._num_steps = step
        self._step_counts.fill_(float(step))

    def _make_shards(self) -> None:
        """Makes masters and moments, and notes where the parts of the parameters lie."""
        names = {located.parameter: name for name, located in self.trained.items()}
        rank, size = self._topology.data_rank, self._topology.data_size
        places: dict[str, _Part] = {}
        for buffer in (buffer for chunk in self._chunks for buffer in chunk.buffers):
            for bucket in buffer.buckets:
                length = bucket.grad_data.numel() // size
                weights, gradients = (
                    data.narrow(0, rank * length, length) for data in (bucket.param_data, bucket.grad_data)
                )
                master = weights.detach().to(torch.float32, copy=True)
                shard = _Shard(weights, gradients, master, torch.zeros_like(master), torch.zeros_like(master))
                self._shards.append(shard)
                first = bucket.offset + rank * length
                for parameter in bucket.params_list:
                    begin, end, _ = buffer.param_index_map[parameter]
                    start, stop = max(begin, first), min(end, first + length)
                    places[names[parameter]] = _Part(shard, begin - first, start - begin, max(0, stop - start))
        self._parts = {name: places[name] for name in self.trained}

    def _make_adam(self, config: RunConfig, is_fused: bool) -> torch.optim.AdamW:
        """AdamW on the parts of this rank; its state is made now, so that a checkpoint can be loaded into it."""
        names = {located.parameter: name for name, located in self.trained.items()}
        groups = []
        masters: dict[str, torch.Tensor] = {}
        for group in decay_groups(self.trained, config.optim):
            members = [names[parameter] for parameter in group["params"] if self._parts[names[parameter]].length]
            for name in members:
                part = self._parts[name]
                masters[name] = part.of(part.shard.master)
                masters[name].grad = part.of(part.shard.gradients)
            groups.append({**group, "params": [masters[name] for name in members]})
        optim = config.optim
        adam = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=is_fused)
        for number, (name, master) in enumerate(masters.items()):
            part = self._parts[name]
            moments = {key: part.of(getattr(part.shard, key)) for key in MOMENTS}
            adam.state[master] = {"step": self._step_counts[number], **moments}
        return adam

    def _gradient_norm(self) -> float:
        """The norm of the whole model's gradient: a replicated parameter counts on the first tensor-parallel rank."""
        counted = [
            part.of(part.shard.gradients)
            for name, part in self._parts.items()
            if part.length and (self.parameters[name].placement.dim is not None or self._topology.tensor_rank == 0)
        ]
        total = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        if counted:
            total += torch.stack(torch._foreach_norm(counted)).double().square().sum()
        dist.all_reduce(total)
        return math.sqrt(total.item())

    def _clip(self, norm: float) -> None:
        factor = self._clip_norm / (norm + _CLIP_EPS) if self._clip_norm else 1.0
        if factor < 1:
            torch._foreach_mul_([shard.gradients for shard in self._shards], factor)

    def _finish_reduction(self) -> None:
        """Waits until this rank's shards hold the gradients of the step.

        Of a replicated parameter the tensor-parallel ranks of a replica hold the same range, and sum what they have.
        """
        for chunk in self._chunks:
            chunk.finish_grad_sync()
        partial = [part for part in (self._parts[name] for name in self._partial) if part.length]
        sum_over_tensor_ranks([part.of(part.shard.gradients) for part in partial], self._topology.tensor_group)
        self._set_gathered()

    def _send_weights(self) -> None:
        """Copies the masters into the weights and starts to exchange them, those first that are needed first."""
        # Where no forward pass has come between, the last exchange is still under way.
        self._wait_for_weights()
        for shard in self._shards:
            shard.weights.copy_(shard.master)
        for chunk in self._chunks:
            for group in reversed(chunk.bucket_groups):
                group.start_param_sync()
        if self.tied is not None:
            # The copy of a tied embedding is sent without a forward pass, whose hooks would wait.
            self._wait_for_weights()

    def _wait_for_weights(self) -> None:
        for chunk in self._chunks:
            for group in chunk.bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def _refresh_weights(self) -> None:
        self._send_weights()
        self._wait_for_weights()

    def _set_gathered(self) -> None:
        """Says that the weights are whole, so that the hooks of a forward pass exchange nothing: they only wait."""
        for chunk in self._chunks:
            for group in chunk.bucket_groups:
                group.param_gather_dispatched = True


def _with_buffers(stage: Stage, number: int, topology: Topology) -> Any:
    """The stage with its weights and gradients in buffers, except a copy of a tied embedding."""
    copied: nn.Parameter | None = stage.output.weight if stage.has_copied_output else None
    is_trained = copied is not None and copied.requires_grad
    if copied is not None:
        copied.requires_grad_(False)
        # Its gradient goes to the rank that owns the weight (`parallel/tied.py`).
        stage.output.gradient_accumulation_fusion = False
    elif stage.is_first and stage.is_last and stage.parts.has_text and stage.output.weight is stage.embedding.weight:
        # Autograd adds what the embedding says to what the projection returns, which then must be zero.
        stage.embedding.weight.zero_out_wgrad = True
    groups = ProcessGroupCollection()
    groups.dp = groups.dp_cp = topology.data_group
    groups.tp, groups.pp = topology.tensor_group, topology.pipeline_group
    # There are no experts: nothing is exchanged in their groups.
    groups.expt_dp, groups.ep = topology.data_group, topology.tensor_group
    chunk = DistributedDataParallel(
        stage.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            # All exchanges of weights are started at once (`_send_weights`): no hook starts the next one.
            align_param_gather=True,
            use_distributed_optimizer=True,
            bucket_size=max(MIN_BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * topology.data_size),
        ),
        stage,
        disable_bucketing=number > 0,
        pg_collection=groups,
    )
    if copied is not None:
        copied.requires_grad_(is_trained)
    return chunk
