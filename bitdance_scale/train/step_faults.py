"""Finds out who gave a number that is not finite, or a spike, and writes it down; the same for every job.

All of it is for the rare bad step: what a step costs otherwise is the trace (`parallel/step_trace.py`). All ranks call
everything alike.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bitdance_scale.config.schema import LossSection
from bitdance_scale.data.index.index import Index
from bitdance_scale.model.flow import combine_losses
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.observe.faults import FAULTS_FILE, Fault, append_faults, describe_faults
from bitdance_scale.parallel.agreement import from_all_ranks
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.step import forward_only
from bitdance_scale.parallel.step_trace import MicroValues, StepTrace, tracing
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.fault_verdict import (
    GRADIENT,
    INPUT,
    LOSS,
    MicroFault,
    MicroReading,
    RankReport,
    Sign,
    explain_non_finite,
    explain_spike,
)
from bitdance_scale.train.step_guards import Spike

logger = logging.getLogger(__name__)

MAX_READINGS = 32
"""Micro-batches that a rank tells of, and lines of a step in faults.jsonl."""
NUM_SPIKE_FAULTS = 4

SampleNames = Callable[[int], tuple[str, str]]
"""(name, shard) of a sample by its key."""


class StepFaults:
    """Explains bad steps in the log and in faults.jsonl, both on the first rank.

    Args:
        topology: the ranks.
        run_folder: the run's folder.
        stages: pipeline stages of this rank.
        name_sample: knows the samples; asked on the first rank only.
    """

    def __init__(self, topology: Topology, run_folder: Path, stages: Sequence[int], name_sample: SampleNames) -> None:
        self._topology, self._run_folder = topology, run_folder
        self._stages, self._name_sample = tuple(stages), name_sample

    def explain_non_finite(self, step: int, readings: Sequence[MicroReading]) -> list[Fault]:
        """Says where a gradient that is not finite came from; a collective.

        Args:
            step: optimiser steps taken, this one included.
            readings: every micro-batch of the step on this rank, with its numbers computed again.

        Returns:
            The faults, on the first rank; [] elsewhere.
        """
        reports = self._gather(readings, [reading for reading in readings if reading.is_suspect])
        headline = f"step {step} is skipped, its gradient is not finite"
        return self._write(step, "non_finite", headline, explain_non_finite(reports) if reports else [])

    def explain_spike(self, step: int, spike: Spike, is_refused: bool, readings: Sequence[MicroReading]) -> list[Fault]:
        """Names the micro-batches with the highest numbers of a step with a spike; a collective, returns as above."""
        ranked = sorted(readings, key=lambda reading: -_rank_value(reading, spike.quantity))
        reports = self._gather(readings, ranked[:NUM_SPIKE_FAULTS])
        headline = f"step {step} {'is skipped' if is_refused else 'is taken'}: {spike}. Highest"
        faults = explain_spike(reports, spike.quantity, NUM_SPIKE_FAULTS) if reports else []
        return self._write(step, "spike", headline, faults)

    def _gather(self, readings: Sequence[MicroReading], chosen: Sequence[MicroReading]) -> list[RankReport]:
        """The reports of all ranks on the first one; [] elsewhere."""
        topology = self._topology
        report = RankReport(
            rank=topology.rank,
            node=socket.gethostname(),
            replica=topology.data_rank,
            tensor_rank=topology.tensor_rank,
            stages=self._stages,
            num_micro=len(readings),
            num_broken=sum(reading.is_broken for reading in readings),
            num_differing=sum(any(sign.differs for sign in reading.signs) for reading in readings),
            readings=tuple(chosen[:MAX_READINGS]),
        )
        reports = from_all_ranks(report)
        return reports if topology.rank == 0 else []

    def _write(self, step: int, kind: str, headline: str, found: Sequence[MicroFault]) -> list[Fault]:
        faults = [self._named(step, kind, fault) for fault in found[:MAX_READINGS]]
        if self._topology.rank == 0:
            logger.warning("%s: %s", headline, describe_faults(faults))
            try:
                append_faults(self._run_folder, faults)
            except OSError as error:
                # The other ranks go on, and the log has it.
                logger.warning("%s: cannot be written (%s)", self._run_folder / FAULTS_FILE, error)
        return faults

    def _named(self, step: int, kind: str, fault: MicroFault) -> Fault:
        samples = []
        for key in fault.keys:
            name, shard = self._name_sample(key)
            samples.append({"key": key, "name": name, "shard": shard})
        return Fault(
            step,
            kind=kind,
            cause=fault.cause,
            rank=fault.rank,
            node=fault.node,
            replica=fault.replica,
            micro_batch=fault.micro_batch,
            evidence=fault.evidence,
            samples=tuple(samples),
        )


def index_names(index: Index | None) -> SampleNames:
    """The names of the samples of an index, by their key in it; streams have none that other ranks know."""
    if index is None:
        return lambda key: (f"key {key}", "a stream")
    return lambda key: (index.name(key), index.shard_path(key))


def compute_again(engine: TrainingEngine, batch: Sequence[PackInputs], topology: Topology) -> StepTrace:
    """The trace of the forward passes of a step that changed nothing, computed once more; a collective."""
    trace = StepTrace()
    with tracing(engine.stages, trace):
        trace.loss_sums = forward_only(engine, batch, topology)
    return trace


def read_trace(
    trace: StepTrace,
    again: StepTrace | None,
    batch: Sequence[PackInputs],
    keys: Sequence[Sequence[int]],
    section: LossSection,
) -> list[MicroReading]:
    """The micro-batches of a step on this rank.

    Args:
        trace: of the step.
        again: of the same forward passes, computed again; None: they were not.
        batch: the micro-batches.
        keys: of the samples of each.
        section: weights of the losses.
    """
    repeated = [None] * len(batch) if again is None else again.read()
    return [
        MicroReading(
            number=number,
            keys=tuple(int(key) for key in sample_keys),
            signs=tuple(_signs(values, other)),
            loss=_own_loss(values, inputs, section),
        )
        for number, (values, other, inputs, sample_keys) in enumerate(
            zip(trace.read(), repeated, batch, keys, strict=True)
        )
    ]


def _signs(values: MicroValues, again: MicroValues | None) -> list[Sign]:
    signs = [
        Sign(INPUT, stage, value, None if again is None else again.inputs[stage])
        for stage, value in values.inputs.items()
    ]
    signs += [Sign(GRADIENT, stage, value) for stage, value in values.gradients.items()]
    if values.loss_sums is not None:
        others = (None, None) if again is None or again.loss_sums is None else again.loss_sums
        last = max(values.inputs)
        signs += [Sign(LOSS, last, value, other) for value, other in zip(values.loss_sums, others, strict=True)]
    return signs


def _own_loss(values: MicroValues, inputs: PackInputs, section: LossSection) -> float | None:
    """The loss of a micro-batch as a mean over its own targets."""
    if values.loss_sums is None:
        return None
    vision, text = (torch.tensor(value) for value in values.loss_sums)
    return float(combine_losses(vision, text, inputs.num_vision_targets, inputs.num_text_targets, section))


def _rank_value(reading: MicroReading, quantity: str) -> float:
    value = reading.loss if quantity == "loss" else reading.largest_gradient
    return float("-inf") if value is None else value
