"""What trains the stages of a rank: the interface of the optimiser engines, and what they have in common.

An engine reduces gradients over data-parallel ranks, takes the norm over the whole model, clips, refuses a step whose
norm is not finite on any rank, and steps AdamW on float32 masters. Losses arrive as parts of a global mean
(`parallel/step.py`), each multiplied by what the engine divides the sum over replicas by.

What a rank keeps of a parameter is a fragment: a range of the flattened local tensor, with its float32 master and two
moments as views into the engine's buffers. Checkpoints read and write these views, so that they know no engine.
"""

from __future__ import annotations

import abc
import contextlib
import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bitdance_scale.config.schema import OptimSection, RunConfig
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.averaged_weights import AveragedWeights
from bitdance_scale.parallel.parameter_names import Parameters, name_parameters
from bitdance_scale.parallel.partition import ConsumedValue, ShardedValue, fragment_pieces
from bitdance_scale.parallel.pipeline_stages import RankStages, Stage
from bitdance_scale.parallel.quantised_linears import quantised_weights
from bitdance_scale.parallel.tied import TiedEmbedding
from bitdance_scale.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


@dataclass(frozen=True)
class StepOutcome:
    """The result of an optimiser step.

    Attributes:
        grad_norm: norm of the whole model's gradient before clipping.
        is_skipped: whether the norm was not finite, so that no rank changed anything.
        is_refused: whether the caller refused the step, with the same effect.
    """

    grad_norm: float
    is_skipped: bool
    is_refused: bool = False


@dataclass(frozen=True)
class Fragment:
    """What this rank's optimiser keeps of one parameter.

    Attributes:
        start: index of the first element in the flattened local parameter.
        master: float32 [n], weights; a view.
        exp_avg, exp_avg_sq: float32 [n], AdamW's moments; views.
        average: float32 [n], the averaged weights; a view. None without averages.
    """

    start: int
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    average: torch.Tensor | None


class TrainingEngine(abc.ABC):
    """The stages of a pipeline rank, trained.

    Args:
        module: the stages, with their initial weights.
        config: the run.
        topology: the ranks.

    Attributes:
        stages: the modules; the engine trains all their parameters except a copy of a tied embedding
            (`parallel/tied.py`).
        tied: moves a tied embedding between the ends of the pipeline; None if embeddings are not tied.
        parameters: global name -> parameter and placement; without weights that are quantised.
        trained: those of them that are trained: all, unless `lora` freezes the others.
        loss_factor: what a loss is multiplied by before it is differentiated: the number that the engine divides the
            sum of the replicas' gradients by.
    """

    loss_factor: int

    def __init__(self, module: RankStages, config: RunConfig, topology: Topology) -> None:
        self.stages: list[Stage] = list(module.stages)
        self.tied = TiedEmbedding(self.stages, topology) if config.model.tie_embeddings else None
        self.parameters: Parameters = name_parameters(module, topology)
        self.trained: Parameters = {
            name: located for name, located in self.parameters.items() if located.parameter.requires_grad
        }
        self._topology = topology
        self._averages: AveragedWeights | None = None

    @abc.abstractmethod
    def forward(self, inputs: PackInputs) -> torch.Tensor:
        """The model's forward pass under the engine's hooks, without a pipeline."""

    @abc.abstractmethod
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Backpropagates one micro-batch; `is_last`: the last one of a step."""

    @abc.abstractmethod
    def external_backward(self) -> contextlib.AbstractContextManager[list[Stage]]:
        """Lends the stages to Megatron-core's schedule for a whole step; afterwards their gradients are reduced."""

    @abc.abstractmethod
    def step(self, lr: float, refuses: Callable[[float], bool] | None = None) -> StepOutcome:
        """Clips and steps with learning rate `lr`, unless the gradient is not finite somewhere; clears gradients.

        Args:
            lr: learning rate of the step.
            refuses: whether a step with this finite gradient norm must change nothing; called once, on all ranks, and
                must give all of them the same answer.
        """

    @abc.abstractmethod
    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of the global loss for a local parameter, before the step; collective over data-parallel ranks.

        For tests and diagnosis: it is assembled from the partitions, which is slow.
        """

    @abc.abstractmethod
    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """(global name, fragment) of each parameter that this rank keeps a part of."""

    @abc.abstractmethod
    def model_values(self) -> dict[str, ShardedValue]:
        """The weights in training dtype, frozen ones among them, as views to save from or load into.

        After an error under the averaged weights this is a collective, in which the trained ones come back.
        """

    @abc.abstractmethod
    def holdings(self) -> dict[str, list[torch.Tensor]]:
        """What the engine keeps from step to step, by kind; several tensors may be views of one storage.

        The kinds are those of `parallel/memory_parts.py`: `weights` in training dtype, `gradients` only if their
        buffer stays, `masters`, `moments` and `averages` in float32, `buffers` for reducing gradients.
        """

    @abc.abstractmethod
    def optimizer_step(self) -> int:
        """Optimiser steps taken, which AdamW counts for its bias correction."""

    @abc.abstractmethod
    def set_optimizer_step(self, step: int) -> None:
        """Restores the number of optimiser steps taken."""

    @abc.abstractmethod
    def _refresh_weights(self) -> None:
        """Copies the masters into the weights, and those of all ranks to all that use them, as after a step."""

    def optimizer_values(self) -> dict[str, ShardedValue]:
        """Float32 masters, moments and averages: `master.<name>`, `exp_avg.<name>` and so on, as views."""
        values = {}
        for name, fragment in self.fragments():
            placement = self.parameters[name].placement
            for key in ("master", *MOMENTS, *([AVERAGE] if self._averages is not None else [])):
                flat = getattr(fragment, key)
                values[f"{key}.{name}"] = fragment_pieces(flat, fragment.start, placement)
        return values

    def trained_values(self) -> dict[str, ShardedValue]:
        """`model_values` of what is trained."""
        return {name: value for name, value in self.model_values().items() if name in self.trained}

    def start_values(self) -> dict[str, ShardedValue | ConsumedValue]:
        """`model_values` and, of frozen linears that are quantised, what quantises them as they are read."""
        quantised = [base for stage in self.stages for base in quantised_weights(stage)]
        return self.model_values() | {base.name: base.value for base in quantised}

    def restart_averages(self) -> None:
        """Begins the average again with the weights as they are, after others were loaded."""
        if self._averages is not None:
            self._averages.restart()

    @contextlib.contextmanager
    def weights_of(self, kind: str) -> Iterator[None]:
        """Within it the model has its `trained` or its `averaged` weights; a collective over data-parallel ranks.

        Outside of it they are the trained ones. What the optimiser holds is exchanged too, so no step is taken in it.
        """
        if kind == "trained":
            yield
            return
        assert self._averages is not None, "`evaluate.weights` and `sample.weights` need `optim.average_decay`"
        with self._averages.in_place_of_masters(self._refresh_weights):
            yield


def decay_groups(parameters: Parameters, section: OptimSection) -> list[dict[str, Any]]:
    """AdamW's parameter groups: those that weight decay is for, and the others; one group if there is no decay.

    Args:
        parameters: those of this rank that are trained, by global name.
        section: `weight_decay`, `decays_vectors`, `decay_exempt`.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, (parameter, placement) in parameters.items():
        is_exempt = any(fnmatch.fnmatchcase(name, pattern) for pattern in section.decay_exempt)
        is_vector = len(placement.global_shape) < 2 and not section.decays_vectors
        groups.setdefault(0.0 if is_exempt or is_vector else section.weight_decay, []).append(parameter)
    # Without a group that is empty, which DeepSpeed does not take.
    return [{"params": members, "weight_decay": decay} for decay, members in groups.items()]
