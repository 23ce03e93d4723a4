"""One optimiser step: forward and backward over all micro-batches, then the update.

Losses are sums over targets, divided by the counts of the *global* batch (all micro-batches of all replicas). The
counts are known before the first backward pass. The gradient therefore does not depend on how many replicas and
micro-batches there are or how full they are; that of an average of averages would (arXiv 2602.14041 Sec. 4.3, weights
0.01 : 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bitdance_scale.config.schema import LossSection
from bitdance_scale.model.flow import combine_losses
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.engine import StepOutcome, TrainingEngine
from bitdance_scale.parallel.pipeline_schedule import run_schedule
from bitdance_scale.parallel.pipeline_stages import Stage
from bitdance_scale.parallel.step_trace import StepTrace, tracing
from bitdance_scale.parallel.still_model import StageHolder
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, phase


@dataclass(frozen=True)
class TargetCounts:
    """Targets of the global batch."""

    num_vision: int
    num_text: int


@dataclass(frozen=True)
class StepLosses:
    """Means over the global batch; the same on every rank."""

    vision: float
    text: float
    total: float


def count_targets(batch: Sequence[PackInputs], topology: Topology) -> TargetCounts:
    """Sums the targets of all micro-batches of all replicas."""
    counts = torch.tensor(
        [sum(inputs.num_vision_targets for inputs in batch), sum(inputs.num_text_targets for inputs in batch)],
        dtype=torch.int64,
        device=topology.device,
    )
    dist.all_reduce(counts, group=topology.data_group)
    num_vision, num_text = counts.tolist()
    return TargetCounts(num_vision, num_text)


def accumulate_gradients(
    engine: TrainingEngine,
    batch: Sequence[PackInputs],
    counts: TargetCounts,
    section: LossSection,
    topology: Topology,
    trace: StepTrace | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepLosses:
    """Runs forward and backward over the micro-batches of this replica.

    Returns the losses of the global batch. The engine then holds the reduced gradients, and `trace` what it keeps of
    every micro-batch. `meanwhile` is called once, when the device has work.
    """
    with tracing(engine.stages, trace):
        sums = _run_micro_batches(engine, batch, counts, section, topology, meanwhile)
    if trace is not None:
        trace.loss_sums = sums
    return _reduce_losses(sums, counts, section, topology)


def _run_micro_batches(
    engine: TrainingEngine,
    batch: Sequence[PackInputs],
    counts: TargetCounts,
    section: LossSection,
    topology: Topology,
    meanwhile: Callable[[], None],
) -> list[torch.Tensor]:
    """Forward and backward; returns the loss sums of every micro-batch on the last stage, [] elsewhere."""
    if topology.pipeline_size > 1:
        sums = _run_pipeline(engine, batch, counts, section, topology)
        # Within the schedule the ranks of a replica wait for each other's messages.
        meanwhile()
        return sums
    sums = []
    for index, inputs in enumerate(batch):
        with phase(Phase.FORWARD):
            loss_sums = engine.forward(inputs)
        with phase(Phase.BACKWARD):
            engine.backward(_loss(loss_sums, counts, section, engine), is_last=index == len(batch) - 1)
        sums.append(loss_sums.detach())
        if index == 0:
            meanwhile()
    return sums


def train_step(
    engine: TrainingEngine,
    batch: Sequence[PackInputs],
    section: LossSection,
    lr: float,
    topology: Topology,
    *,
    trace: StepTrace | None = None,
    refuses: Callable[[StepLosses, float], bool] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[StepLosses, StepOutcome]:
    """One optimiser step on the micro-batches of this replica.

    Args:
        engine: the model.
        batch: the micro-batches.
        section: weights of the losses.
        lr: learning rate of the step.
        topology: the ranks.
        trace: keeps what every micro-batch gave on this rank.
        refuses: whether a step with these losses and this finite gradient norm must change nothing
            (`TrainingEngine.step`).
        meanwhile: what the host does while the device computes; it is called on all ranks, and may be a collective.
    """
    counts = count_targets(batch, topology)
    losses = accumulate_gradients(engine, batch, counts, section, topology, trace, meanwhile)
    with phase(Phase.OPTIMISER):
        return losses, engine.step(lr, None if refuses is None else lambda norm: refuses(losses, norm))


@torch.no_grad()
def forward_only(model: StageHolder, batch: Sequence[PackInputs], topology: Topology) -> list[torch.Tensor]:
    """What the last stage returns for every micro-batch of this replica, without gradients; [] on other stages."""
    if model.tied is not None:
        model.tied.share_weight()
    if topology.pipeline_size == 1:
        return [model.stages[0](inputs) for inputs in batch]

    def keep_output(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return output[0], output.new_zeros((), dtype=torch.int), output

    return run_schedule(
        model.stages, batch, topology, lambda stage, inputs: stage(inputs), keep_output, is_forward_only=True
    )


def _loss(sums: torch.Tensor, counts: TargetCounts, section: LossSection, engine: TrainingEngine) -> torch.Tensor:
    """This micro-batch's part of the global loss, times what the engine will divide by."""
    loss = combine_losses(sums[0], sums[1], counts.num_vision, counts.num_text, section)
    return loss * engine.loss_factor


def _run_pipeline(
    engine: TrainingEngine, batch: Sequence[PackInputs], counts: TargetCounts, section: LossSection, topology: Topology
) -> list[torch.Tensor]:
    """Forward and backward through the stages of a pipeline.

    Returns the loss sums of every micro-batch on the last stage, [] elsewhere.
    """

    def reduce_output(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The second value is a token count, which the schedule only adds up.
        return _loss(sums, counts, section, engine), sums.new_zeros((), dtype=torch.int), sums.detach()

    def forward(stage: Stage, inputs: PackInputs) -> torch.Tensor:
        with phase(Phase.FORWARD):
            output: torch.Tensor = stage(inputs)
            return output

    # Between the forward passes of the schedule.
    with phase(Phase.BACKWARD), engine.external_backward() as stages:
        return run_schedule(stages, batch, topology, forward, reduce_output)


def _reduce_losses(
    sums: list[torch.Tensor], counts: TargetCounts, section: LossSection, topology: Topology
) -> StepLosses:
    total = torch.zeros(2, dtype=torch.float32, device=topology.device)
    for part in sums:
        total += part
    dist.all_reduce(total, group=topology.data_group)
    if topology.pipeline_size > 1:
        dist.broadcast(total, topology.last_stage_rank, group=topology.pipeline_group)
    vision, text = total.tolist()
    loss = combine_losses(total[0], total[1], counts.num_vision, counts.num_text, section).item()
    return StepLosses(
        vision=vision / counts.num_vision if counts.num_vision else 0.0,
        text=text / counts.num_text if counts.num_text else 0.0,
        total=loss,
    )
