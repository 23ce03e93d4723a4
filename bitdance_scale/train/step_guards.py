"""The rules on the numbers of a step: when a loss or a gradient is a spike, and when too many steps are skipped.

They see numbers that are the same on all ranks, and decide the same on all ranks. What they remember goes into the
checkpoint, so that a resumed run decides as an unbroken one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bitdance_scale.errors import TrainingError

MAD_TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""
MIN_DEVIATION_SHARE = 0.05
"""Least deviation over the median: a window without scatter would call every change of the last digit a spike."""


class GuardSection(Protocol):
    """The settings of `[optim]` that every job has."""

    @property
    def max_skipped_steps(self) -> int:
        """Consecutive skipped steps that are borne."""

    @property
    def max_skipped_share(self) -> float:
        """Share of the last `skipped_window` steps that may be skipped."""

    @property
    def skipped_window(self) -> int:
        """Steps of that share."""

    @property
    def spike_deviations(self) -> float:
        """Deviations above the median at which a spike begins; 0: nothing is one."""

    @property
    def spike_window(self) -> int:
        """Steps of the median."""

    @property
    def spike_action(self) -> str:
        """`log` or `skip`."""


@dataclass(frozen=True)
class Spike:
    """A number far above its ordinary course.

    Attributes:
        quantity: `loss` or `grad_norm`.
        value: of this step.
        median: of the window before it.
        limit: what the value is above.
    """

    quantity: str
    value: float
    median: float
    limit: float

    def __str__(self) -> str:
        return f"{self.quantity} {self.value:.4g} is above {self.limit:.4g} (median of the window {self.median:.4g})"


def spike_limit(values: list[float], deviations: float) -> tuple[float, float]:
    """(median, limit) of a window: `median + deviations * max(1.4826 MAD, 5 % of |median|)`."""
    median = statistics.median(values)
    scatter = MAD_TO_SIGMA * statistics.median(abs(value - median) for value in values)
    return median, median + deviations * max(scatter, MIN_DEVIATION_SHARE * abs(median))


class StepGuards:
    """What a run remembers of its last steps, and the rules on it.

    The value of a spike that is only logged enters the window, because the step was taken: the course goes on from it,
    and the median bears less than half a window of them. The value of a step that was skipped does not: the weights are
    those before it, and a course that stays up is ended by the rules on skipped steps rather than learnt.

    Args:
        section: the settings.

    Attributes:
        num_spikes: steps of the run so far with a spike.
        num_refused_steps: those of them that changed nothing.
    """

    def __init__(self, section: GuardSection) -> None:
        self._section = section
        self._skipped: deque[int] = deque(maxlen=section.skipped_window)
        self._windows: dict[str, deque[float]] = {
            quantity: deque(maxlen=section.spike_window) for quantity in ("loss", "grad_norm")
        }
        self._num_in_a_row = 0
        self.num_spikes = self.num_refused_steps = 0

    @property
    def judges_spikes(self) -> bool:
        """Whether there is a rule on spikes."""
        return self._section.spike_deviations > 0

    @property
    def refuses_spikes(self) -> bool:
        """Whether a step with a spike must change nothing."""
        return self._section.spike_action == "skip"

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike of a step whose gradient is finite, if it has one; counts it. Called once per step.

        Args:
            loss: of the global batch.
            grad_norm: before clipping.
        """
        spike = None
        values = {"loss": loss, "grad_norm": grad_norm}
        for quantity, window in self._windows.items():
            if spike is None and len(window) == window.maxlen:
                median, limit = spike_limit(list(window), self._section.spike_deviations)
                # A window of zeros has no scale.
                if values[quantity] > limit and limit != median:
                    spike = Spike(quantity, values[quantity], median, limit)
        self.num_spikes += int(spike is not None)
        if spike is not None and self.refuses_spikes:
            self.num_refused_steps += 1
            return spike
        for quantity, window in self._windows.items():
            if math.isfinite(values[quantity]):
                window.append(values[quantity])
        return spike

    def count(self, step: int, is_skipped: bool) -> None:
        """Counts a step, for whatever reason it was skipped.

        Args:
            step: optimiser steps taken, this one included.
            is_skipped: whether it changed nothing.

        Raises:
            TrainingError: more steps were skipped than the settings allow.
        """
        section = self._section
        self._skipped.append(int(is_skipped))
        self._num_in_a_row = self._num_in_a_row + 1 if is_skipped else 0
        num_skipped = sum(self._skipped)
        if self._num_in_a_row > section.max_skipped_steps:
            raise TrainingError(
                f"step {step}: {self._num_in_a_row} consecutive steps were skipped, as their gradient was not finite "
                f"or a spike (optim.max_skipped_steps = {section.max_skipped_steps}). {_REMEDY}"
            )
        # Of the whole window, however few of its steps there have been: the first skipped step is no share of 100 %.
        if num_skipped > section.max_skipped_share * section.skipped_window:
            raise TrainingError(
                f"step {step}: {num_skipped} of the last {len(self._skipped)} steps were skipped, as their gradient "
                f"was not finite or a spike (optim.max_skipped_share = {section.max_skipped_share:g} of "
                f"optim.skipped_window = {section.skipped_window}). {_REMEDY}"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "skipped": list(self._skipped),
            "skipped_in_a_row": self._num_in_a_row,
            "spikes": self.num_spikes,
            "refused_steps": self.num_refused_steps,
            **{quantity: list(window) for quantity, window in self._windows.items()},
        }

    def restore(self, state: Mapping[str, Any], *, keeps_windows: bool = True) -> None:
        """Goes on from `state()`; {}, from a checkpoint of an earlier version, starts with empty windows.

        Under shorter windows than those of the checkpoint, the last values count.

        Args:
            state: what the checkpoint keeps.
            keeps_windows: whether the losses and norms in it are of the scale of those to come. If not, the windows of
                the rule on spikes begin again; with `skip`, those of another scale would refuse every step.
        """
        self._skipped.extend(state.get("skipped", []))
        self._num_in_a_row = state.get("skipped_in_a_row", 0)
        self.num_spikes, self.num_refused_steps = state.get("spikes", 0), state.get("refused_steps", 0)
        if keeps_windows:
            for quantity, window in self._windows.items():
                window.extend(state.get(quantity, []))


_REMEDY = (
    "The last checkpoint is sound: resume from it with a lower optim.lr, or look for damaged samples; faults.jsonl in "
    "the run folder names those of the skipped steps."
)
