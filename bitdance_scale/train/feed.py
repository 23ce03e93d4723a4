"""The inputs of every step, made while the step before it trains.

A step is read one ahead on the main thread, where all collective calls are, in an order that is the same on every
rank. What is left, this rank's own work on it (noise, mask, copies to the device), is done in one thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from bitdance_scale.errors import BitDanceError
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.agreement import all_ranks
from bitdance_scale.parallel.broadcast import SharedStep
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.train.reading import StepReport

Prepare = Callable[[Sequence[Pack], int], list[PackInputs]]
"""Makes the micro-batches of a step out of its packs and its number; called in the thread."""


@dataclass(frozen=True)
class FedStep:
    """One step, ready to train.

    Attributes:
        packs: the micro-batches of this replica, as read.
        batch: the same on the device.
        report: what the reader says of this step, its loader state included.
        wait_s: seconds that this replica waited for its loader while the step was taken, whichever step it read.
    """

    packs: Sequence[Pack]
    batch: list[PackInputs]
    report: StepReport
    wait_s: float


class StepFeed:
    """Hands out steps `first_step` .. `num_steps - 1`, each prepared while the one before it trains.

    A context manager; all ranks call it alike. Never reads a step behind the last.

    Args:
        read: reads the next step, a collective call (`StepReader.next_step`).
        prepare: makes its inputs; needs no other rank.
        first_step: number of the step that `read` gives first.
        num_steps: number of the step that is read no more.
        device: where the inputs are made.
    """

    def __init__(
        self,
        read: Callable[[], SharedStep],
        prepare: Prepare,
        first_step: int,
        num_steps: int,
        device: torch.device,
    ) -> None:
        self._read, self._prepare, self._device = read, prepare, device
        self._next_step, self._num_steps = first_step, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-feed")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[SharedStep, Future[list[PackInputs]]] | None = None
        self._failure: BitDanceError | None = None
        self._wait_s = 0.0

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> FedStep:
        """The next step; starts preparing the one after it.

        Raises:
            BitDanceError: on all ranks, what is wrong with the data of this step; that of the step after it is told
                when that one is taken, so that this step can be trained and saved first.
        """
        if self._failure is not None:
            raise self._failure
        if self._ahead is None:
            self._ahead = self._start_next()
        assert self._ahead is not None, "all steps have been taken"
        shared, preparation = self._ahead
        self._ahead = None
        with all_ranks():
            batch = preparation.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        try:
            self._ahead = self._start_next()
        except BitDanceError as error:
            self._failure = error
        wait_s, self._wait_s = self._wait_s, 0.0
        return FedStep(shared.packs, batch, shared.report, wait_s)

    def close(self) -> None:
        """Ends the thread; a preparation under way is finished first, its result and its error are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start_next(self) -> tuple[SharedStep, Future[list[PackInputs]]] | None:
        """Reads the next step and has it prepared; None behind the last."""
        if self._next_step == self._num_steps:
            return None
        shared = self._read()
        self._wait_s += shared.report.wait_s
        begun = None
        if self._stream is not None:
            # Inputs that have been trained on give their memory back to this stream, which does not wait for the one
            # that trains: new ones are written behind everything that the device has been given so far.
            begun = torch.cuda.current_stream(self._device).record_event()
        preparation = self._thread.submit(self._run, shared.packs, self._next_step, begun)
        self._next_step += 1
        return shared, preparation

    def _run(self, packs: Sequence[Pack], step: int, begun: torch.cuda.Event | None) -> list[PackInputs]:
        if self._stream is None:
            return self._prepare(packs, step)
        # A stream of its own: on the one that trains, copies would stand behind the kernels of the present step.
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(begun)
            return self._prepare(packs, step)
