"""DeepSpeed ZeRO over the data-parallel ranks: the only module that knows DeepSpeed.

The engine partitions optimiser state (stage 1), gradients (2) and parameters (3). It reduces gradients, takes the norm
over the whole model, clips, refuses a step whose norm is not finite on any rank, and steps AdamW on float32 masters.
Its configuration is derived from the run's. Losses arrive as parts of a global mean (`parallel/step.py`): the engine's
average over data-parallel ranks is undone there, and its division by accumulation steps is not used.

What a rank keeps of a parameter is a fragment: a range of the flattened local tensor, with its float32 master and two
moments as views into the engine's buffers. Checkpoints read and write these views.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import safe_get_full_grad

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.averaged_weights import AveragedWeights
from bitdance_scale.parallel.engine import MOMENTS, Fragment, StepOutcome, TrainingEngine, decay_groups
from bitdance_scale.parallel.engine_setup import no_compiler
from bitdance_scale.parallel.parameter_names import Parameters
from bitdance_scale.parallel.partial_gradients import leave_gradients_partial, sum_over_tensor_ranks
from bitdance_scale.parallel.partition import ShardedValue, fragment_pieces, whole_pieces
from bitdance_scale.parallel.pipeline_stages import RankStages, Stage
from bitdance_scale.parallel.scattered_gradients import ScatteredGradients
from bitdance_scale.parallel.topology import Topology

# A shared-memory all-reduce for inference on CPUs, which every process would compile or load when it starts.
deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves out a step which it is told to refuse: weights, moments and step count stay as they are.

    DeepSpeed knows the norm of the whole gradient only inside its own step, just before it calls this one, under
    ZeRO-3 once per group of parameters. What it does afterwards is to copy the masters into the weights again.

    Attributes:
        is_refused: asked at every call; None: no step is refused.
    """

    is_refused: Callable[[], bool] | None = None

    def step(self, closure: Any = None) -> Any:
        """Steps, unless the step is refused."""
        if self.is_refused is not None and self.is_refused():
            return None
        return super().step(closure)


# DeepSpeed's list of the optimisers that it was tested with holds AdamW.
ZERO_SUPPORTED_OPTIMIZERS.append(GuardedAdamW)


def deepspeed_config(config: RunConfig, data_size: int, num_elements: int) -> dict[str, object]:
    """DeepSpeed's configuration, derived from the run's; under bfloat16 gradients are accumulated in float32.

    Args:
        config: the run.
        data_size: data-parallel ranks.
        num_elements: elements of this rank's trained parameters. The buffer in which gradients are reduced needs no
            more than these: the sums do not depend on which gradients are reduced together.
    """
    parallel = config.parallel
    settings: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": data_size,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            # ZeRO-1 reduces after the last backward pass of a step: there is nothing beside it.
            "overlap_comm": parallel.zero_stage > 1,
            # The buffer exists in full, however small the model is.
            "reduce_bucket_size": min(num_elements, parallel.reduce_bucket_elements),
            "stage3_prefetch_bucket_size": parallel.prefetch_elements,
            "stage3_max_live_parameters": parallel.live_elements,
            "stage3_max_reuse_distance": parallel.live_elements,
            "stage3_param_persistence_threshold": parallel.persistent_elements,
        },
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[parallel.reduce_dtype],
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.run.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


class ZeroEngine(TrainingEngine):
    """The stages of a pipeline rank under ZeRO.

    Args:
        module: the stages, with their initial weights.
        config: the run.
        topology: the ranks.
        is_fused: whether AdamW is one kernel without temporary tensors; None: only on CUDA.
    """

    def __init__(self, module: RankStages, config: RunConfig, topology: Topology, is_fused: bool | None = None) -> None:
        super().__init__(module, config, topology)
        # DeepSpeed averages gradients over the replicas.
        self.loss_factor = topology.data_size
        self._zero_stage = config.parallel.zero_stage
        # ZeRO-2 and 3 take every micro-batch's gradient as soon as it exists.
        self._partial = leave_gradients_partial(self.stages) if self._zero_stage == 1 else []
        optimizer = GuardedAdamW(
            decay_groups(self.trained, config.optim),
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
            fused=topology.device.type == "cuda" if is_fused is None else is_fused,
        )
        with no_compiler():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(config, topology.data_size, _num_elements(self.trained)),
                mpu=topology,
                dist_init_required=False,
            )
        self._optimizer = self._engine.optimizer
        self._adam = self._engine.basic_optimizer
        self._scattered: ScatteredGradients | None = None
        if self._zero_stage == 1 and config.run.dtype == "bfloat16":
            reduce_dtype = getattr(torch, config.parallel.reduce_dtype)
            self._scattered = ScatteredGradients(self._optimizer, topology, reduce_dtype)
        self._make_moments()
        decay = config.optim.average_decay
        self._averages = AveragedWeights(self._flat_masters(), decay) if decay else None

    def forward(self, inputs: PackInputs) -> torch.Tensor:
        """The model's forward pass under the engine's hooks, without a pipeline."""
        return self._engine(inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Backpropagates one micro-batch; under ZeRO-1 gradients are reduced after the last one of a step."""
        is_reduced_here = is_last and self._zero_stage == 1
        self._engine.set_gradient_accumulation_boundary(is_last and not is_reduced_here)
        self._engine.backward(loss, scale_wrt_gas=False)
        if is_reduced_here:
            self._reduce_gradients()

    @contextlib.contextmanager
    def external_backward(self) -> Iterator[list[Stage]]:
        """Lends the stages to Megatron-core's schedule for a whole step, then reduces their gradients (ZeRO-1)."""
        self._engine.set_gradient_accumulation_boundary(False)
        if self.tied is not None:
            self.tied.share_weight()
        yield self.stages
        if self.tied is not None:
            self.tied.return_gradient()
        self._reduce_gradients()

    def _reduce_gradients(self) -> None:
        """Sums the gradients of a step over the ranks that have parts of them (ZeRO-1)."""
        sum_over_tensor_ranks([_accumulated(parameter) for parameter in self._partial], self._topology.tensor_group)
        self._engine.set_gradient_accumulation_boundary(True)
        if self._scattered is not None:
            self._scattered.reduce()
        else:
            self._engine.allreduce_gradients()

    def step(self, lr: float, refuses: Callable[[float], bool] | None = None) -> StepOutcome:
        """As in `TrainingEngine`; DeepSpeed takes the norm in its own step, in which `refuses` is asked."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        answers: list[bool] = []

        def is_refused() -> bool:
            assert refuses is not None
            if not answers:
                answers.append(refuses(float(self._optimizer._global_grad_norm)))
            return answers[0]

        self._adam.is_refused = None if refuses is None else is_refused
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        outcome = StepOutcome(grad_norm=norm, is_skipped=bool(self._optimizer.overflow), is_refused=any(answers))
        if self._averages is not None and not (outcome.is_skipped or outcome.is_refused):
            self._averages.update()
        return outcome

    def _refresh_weights(self) -> None:
        """Copies the masters into the weights, and those of all ranks to all that use them, as after a step."""
        if self._zero_stage < 3:
            self._optimizer.update_lp_params()
            return
        with torch.no_grad():
            for group in range(len(self._optimizer.fp16_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters stay gathered from step to step.
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of the global loss for a local parameter, before the step; collective over data-parallel ranks.

        For tests and diagnosis: it is assembled from the partitions, which is slow.
        """
        return safe_get_full_grad(self.parameters[name].parameter).float()

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """(global name, fragment) of each parameter that this rank keeps a part of."""
        for name, (parameter, _) in self.trained.items():
            kept = self._locate(parameter)
            if kept is None:
                continue
            flat, offset, start, length = kept
            state = self._adam.state[flat]
            master, exp_avg, exp_avg_sq = (
                tensor.narrow(0, offset, length) for tensor in (flat.data, *(state[key] for key in MOMENTS))
            )
            average = None if self._averages is None else self._averages.of(flat).narrow(0, offset, length)
            yield name, Fragment(start, master, exp_avg, exp_avg_sq, average)

    def model_values(self) -> dict[str, ShardedValue]:
        """The weights in training dtype, as views to save from or load into.

        Under ZeRO-3, load only before the first step: from then on DeepSpeed keeps small parameters gathered in
        addition to the parts that these views show. After an error under the averaged weights this is a collective, in
        which the trained ones come back.
        """
        if self._averages is not None:
            self._averages.refresh_stale(self._refresh_weights)
        values = {}
        for name, (parameter, placement) in self.parameters.items():
            if self._zero_stage == 3:
                start, length = self._partition_range(parameter)
                flat = _under_zero3(parameter).ds_tensor.data.narrow(0, 0, length)
                values[name] = fragment_pieces(flat, start, placement)
            else:
                values[name] = whole_pieces(parameter.data, placement)
        return values

    def holdings(self) -> dict[str, list[torch.Tensor]]:
        """What the engine keeps from step to step, by kind; several tensors may be views of one storage.

        `weights` in training dtype, `masters`, `moments` and `averages` in float32, `buffers` for reducing gradients
        (ZeRO-3 only: the other stages make them again in every step).
        """
        parameters = [located.parameter for located in self.parameters.values()]
        masters = self._flat_masters()
        # Tables that are computed count as weights: they stay as long.
        weights = [parameter.data for parameter in parameters]
        weights += [table for stage in self.stages for table in stage.buffers()]
        buffers = []
        if self._zero_stage == 3:
            weights += [_under_zero3(parameter).ds_tensor.data for parameter in parameters]
            buffers += [bucket.buffer for bucket in self._optimizer.ipg_buckets.values()]
        return {
            "weights": weights,
            "masters": masters,
            "moments": [self._adam.state[flat][key] for flat in masters for key in MOMENTS],
            "averages": [] if self._averages is None else list(self._averages.buffers),
            "buffers": buffers,
        }

    def optimizer_step(self) -> int:
        """Optimiser steps taken, which AdamW counts for its bias correction."""
        return int(self._adam.state[self._flat_masters()[0]]["step"].item())

    def set_optimizer_step(self, step: int) -> None:
        """Restores the number of optimiser steps taken."""
        for flat in self._flat_masters():
            self._adam.state[flat]["step"].fill_(float(step))

    def _flat_masters(self) -> list[torch.Tensor]:
        """The float32 buffers on which AdamW steps."""
        if self._zero_stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]

    def _make_moments(self) -> None:
        """Makes AdamW's state now rather than at the first step, so that a checkpoint can be loaded into it."""
        for flat in self._flat_masters():
            # A tensor on the device, as fused AdamW requires.
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self._adam.state[flat] = {"step": step, **moments}

    def _locate(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int, int, int] | None:
        """(flat buffer, offset in it, start in the flattened parameter, length) of this rank's fragment."""
        if self._zero_stage == 3:
            group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start, length = self._partition_range(parameter)
            return (self._flat_masters()[group], int(offset), start, length) if length else None
        mapping = cast(_LinkedParameter, parameter)._hp_mapping
        if mapping is None:
            return None
        flat = self._flat_masters()[mapping.param_group_index]
        return (
            flat,
            mapping.hp_fragment_address.start,
            mapping.lp_fragment_address.start,
            mapping.lp_fragment_address.numel,
        )

    def _partition_range(self, parameter: torch.Tensor) -> tuple[int, int]:
        """(start, length) of this rank's ZeRO-3 partition; the last ranks' partitions are padded and may be empty."""
        partitioned = _under_zero3(parameter)
        size = partitioned.ds_tensor.ds_numel
        start = min(self._topology.data_rank * size, partitioned.ds_numel)
        return start, min(size, partitioned.ds_numel - start)


class _Partition(Protocol):
    """A rank's padded part of a parameter."""

    data: torch.Tensor
    ds_numel: int


class _PartitionedParameter(Protocol):
    """What ZeRO-3 adds to a parameter: this rank's part, and the number of elements of the whole."""

    ds_tensor: _Partition
    ds_numel: int


class _LinkedParameter(Protocol):
    """What ZeRO-1 and 2 add to a parameter: where its fragment lies in the flat buffers; None if it is elsewhere."""

    _hp_mapping: Any


def _accumulated(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of the micro-batches so far under ZeRO-1: in float32 under bfloat16, else autograd's own."""
    gradient = getattr(parameter, "_hp_grad", parameter.grad)
    assert gradient is not None, "every micro-batch passes through all layers"
    return cast(torch.Tensor, gradient)


def _under_zero3(parameter: torch.Tensor) -> _PartitionedParameter:
    return cast(_PartitionedParameter, parameter)


def _num_elements(parameters: Parameters) -> int:
    return sum(located.parameter.numel() for located in parameters.values())
