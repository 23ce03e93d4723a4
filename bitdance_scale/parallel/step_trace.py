"""What each micro-batch of a step gave on this rank, kept on the device and read only when something is wrong.

Per stage and micro-batch it keeps the largest magnitude of the hidden states that enter the stage's layers, and that of
their gradient, and on the last stage the loss sums. A magnitude is not finite if one element is not. Nothing here waits
for the device, and nothing changes a number: each value is one reduction over [S, B, D].

The hidden states that enter a stage lie outside what `parallel.recompute` computes again, so their hook is called once.
Under sequence parallelism a tensor-parallel rank sees its own positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class MicroValues:
    """One micro-batch of a stage on this rank, as plain numbers.

    Attributes:
        inputs: stage -> largest magnitude of what entered it.
        gradients: stage -> largest magnitude of the gradient there; none after a forward pass alone.
        loss_sums: loss sums (vision, text) on the last stage, exact; None elsewhere.
    """

    inputs: dict[int, float]
    gradients: dict[int, float]
    loss_sums: tuple[float, float] | None


class StepTrace:
    """Collects the values of one step.

    Attributes:
        loss_sums: float32 [2] or longer, per micro-batch; [] on all ranks but those of the last stage.
    """

    def __init__(self) -> None:
        self.loss_sums: list[torch.Tensor] = []
        self._inputs: dict[int, list[torch.Tensor]] = {}
        self._gradients: dict[tuple[int, int], torch.Tensor] = {}

    def watch(self, stage: int, hidden_SBD: torch.Tensor) -> None:
        """Takes the hidden states that enter a stage; micro-batches pass through a stage in their order."""
        entered = self._inputs.setdefault(stage, [])
        number = len(entered)
        entered.append(_magnitude(hidden_SBD))
        if hidden_SBD.requires_grad:

            def keep(gradient_SBD: torch.Tensor) -> None:
                self._gradients[stage, number] = _magnitude(gradient_SBD)

            hidden_SBD.register_hook(keep)

    def read(self) -> list[MicroValues]:
        """The values of every micro-batch, in order; waits for the device once."""
        num_micro = max([len(self.loss_sums), *map(len, self._inputs.values())])
        tensors = [value for values in self._inputs.values() for value in values]
        tensors += [*self._gradients.values(), *(value for sums in self.loss_sums for value in sums[:2])]
        numbers = iter(torch.stack([tensor.float() for tensor in tensors]).tolist())
        inputs = {stage: [next(numbers) for _ in values] for stage, values in self._inputs.items()}
        gradients = {place: next(numbers) for place in self._gradients}
        sums = [(next(numbers), next(numbers)) for _ in self.loss_sums]
        return [
            MicroValues(
                inputs={stage: values[number] for stage, values in inputs.items()},
                gradients={stage: value for (stage, micro), value in gradients.items() if micro == number},
                loss_sums=sums[number] if sums else None,
            )
            for number in range(num_micro)
        ]


class TracedStage(Protocol):
    """What `tracing` sets on a stage."""

    trace: StepTrace | None


@contextlib.contextmanager
def tracing(stages: Sequence[TracedStage], trace: StepTrace | None) -> Iterator[None]:
    """The forward passes within the block are traced."""
    for stage in stages:
        stage.trace = trace
    try:
        yield
    finally:
        for stage in stages:
            stage.trace = None


def _magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, without a temporary tensor; NaN if an element is NaN."""
    return torch.linalg.vector_norm(tensor.detach(), float("inf"))
