"""The steps of a run, ready to train: read by one rank of each replica, known to all of its ranks, on the device.

A step is read one ahead on the main thread, where all collective calls are, in an order that is the same on every
rank. On CUDA that is done when the device has work already: packs are exchanged between the hosts, for which it would
otherwise wait. What is left, this rank's own work on it (noise, mask, copies to the device), is done in one thread of
its own while the step before it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.data_errors import ErrorCounter
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import LoadedStep, Loader
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.plan.filters import FilterCount
from bitdance_scale.data.plan.plan import StreamUse
from bitdance_scale.data.stream import StreamLoader
from bitdance_scale.errors import BitDanceError
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.agreement import all_ranks, from_all_ranks, largest_number
from bitdance_scale.parallel.broadcast import share_step
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, phase
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.vision.tokenizer import VisionTokenizer

Prepare = Callable[[Sequence[Pack], int], list[PackInputs]]
"""Makes the micro-batches of a step out of its packs and its number; called in the thread."""


class StepReader:
    """The packs of every step, read by one rank of each replica and known to all of its ranks; a context manager.

    An error of any reader is raised on all ranks of the job, as is one about samples that all of them together skip.

    Args:
        config: the run.
        index: the data set, from `shared_index.py`; None with `data.mode = "stream"`.
        condition: what images are drawn from.
        vision: encodes the images.
        topology: the ranks.
        state: loader state to go on from, JSON values; None starts at step 0.
    """

    def __init__(
        self,
        config: RunConfig,
        index: Index | None,
        condition: Condition,
        vision: VisionTokenizer,
        topology: Topology,
        state: dict[str, Any] | None,
    ) -> None:
        self._vision, self._topology = vision, topology
        self._loader: Loader | StreamLoader | None = None
        self._is_stream = index is None
        # Of a rank that does not read they stay empty. Streams have one more (`StreamLoader.error_counters`).
        num_counters = 2 if self._is_stream else 1
        self._error_counters = tuple(ErrorCounter(config.data.max_skipped_share) for _ in range(num_counters))
        with all_ranks():
            if topology.is_reader:
                resumed = None if state is None else LoaderState.from_dict(state)
                replica = (topology.data_rank, topology.data_size)
                if index is None:
                    self._loader = StreamLoader(config, condition, *replica, resumed)
                else:
                    self._loader = Loader(config, condition, index, *replica, resumed)
                self._error_counters = self._loader.error_counters

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._loader is not None:
            self._loader.close()

    def uses(self, num_steps: int) -> list[StreamUse]:
        """What so many steps take of every source, on a rank that reads (the first one does); elsewhere nothing."""
        return self._loader.plan.uses(num_steps) if isinstance(self._loader, Loader) else []

    def filter_counts(self) -> dict[str, list[FilterCount]]:
        """What the filters leave out, by source, on a rank that reads; elsewhere nothing."""
        return self._loader.plan.filter_counts() if isinstance(self._loader, Loader) else {}

    def next_step(self) -> LoadedStep:
        """The packs of the next step with their images encoded; a collective.

        Raises:
            BitDanceError: on all ranks, what is wrong with the data; a `DataError` if too many samples were skipped.
        """
        read = None
        totals = [0, 0] * len(self._error_counters)
        with all_ranks(sums=totals), phase(Phase.READING):
            if self._loader is not None:
                read = self._loader.next_step()
                totals[:] = [total for counter in self._error_counters for total in counter.totals]
        for counter, num_read, num_skipped in zip(self._error_counters, totals[::2], totals[1::2], strict=True):
            counter.check((num_read, num_skipped), from_all_ranks)
        if self._is_stream:
            # Streams are not planned for all replicas, but all of them must run the same number of packs.
            num_packs = largest_number(0 if read is None else len(read.packs))
            if read is not None and isinstance(self._loader, StreamLoader):
                read = self._loader.filled(read, num_packs)
        with phase(Phase.ENCODING):
            return share_step(read, self._vision, self._topology)


@dataclass(frozen=True)
class ReadyStep:
    """One step, ready to train.

    Attributes:
        loaded: its packs as read, and what the loader says of them.
        batch: the packs on the device.
        wait_s: seconds that this replica waited for its loader since the step before was taken, whichever step it read.
    """

    loaded: LoadedStep
    batch: list[PackInputs]
    wait_s: float


class StepFeed:
    """Hands out steps `first_step` .. `num_steps - 1`, each prepared while the one before it trains.

    A context manager; all ranks call it alike. It never reads a step after the last.

    Args:
        read: reads the next step, a collective call (`StepReader.next_step`).
        prepare: makes its inputs; needs no other rank.
        first_step: number of the step that `read` gives first.
        num_steps: number of the step that is not read any more.
        device: where the inputs are made.
    """

    def __init__(
        self,
        read: Callable[[], LoadedStep],
        prepare: Prepare,
        first_step: int,
        num_steps: int,
        device: torch.device,
    ) -> None:
        self._read, self._prepare, self._device = read, prepare, device
        self._next_step, self._num_steps = first_step, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-feed")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: torch.cuda.Event | None = None
        self._ahead: tuple[LoadedStep, Future[list[PackInputs]]] | None = None
        self._failure: BitDanceError | None = None
        self._wait_s = 0.0

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> ReadyStep:
        """The next step; `read_ahead` is called while it trains. On a processor it is called here.

        Raises:
            BitDanceError: on all ranks, what is wrong with the data of this step. An error of the step after it is
                raised when that one is taken, so that this step can be trained and saved first.
        """
        self.read_ahead()
        if self._failure is not None:
            raise self._failure
        assert self._ahead is not None, "all steps have been taken"
        loaded, preparation = self._ahead
        self._ahead = None
        with all_ranks():
            batch = preparation.result()
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            # Inputs that have been trained on give their memory back to the feed's stream, which does not wait for the
            # one that trains: new ones are written after everything that the device has been given so far.
            self._begun = stream.record_event()
        else:
            self.read_ahead()
        wait_s, self._wait_s = self._wait_s, 0.0
        return ReadyStep(loaded, batch, wait_s)

    def read_ahead(self) -> None:
        """Reads the next step, if it is not read yet, and has it prepared; a collective.

        An error of its data is kept for `take`.
        """
        if self._ahead is not None or self._failure is not None:
            return
        try:
            self._ahead = self._start_next()
        except BitDanceError as error:
            self._failure = error

    def close(self) -> None:
        """Ends the thread; a preparation under way is finished first, its result and its error are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start_next(self) -> tuple[LoadedStep, Future[list[PackInputs]]] | None:
        """Reads the next step and has it prepared; None after the last."""
        if self._next_step == self._num_steps:
            return None
        loaded = self._read()
        self._wait_s += loaded.wait_s
        packs = [pack.pack for pack in loaded.packs]
        preparation = self._thread.submit(self._run, packs, self._next_step, self._begun)
        self._next_step += 1
        return loaded, preparation

    def _run(self, packs: Sequence[Pack], step: int, begun: torch.cuda.Event | None) -> list[PackInputs]:
        if self._stream is None:
            return self._prepare(packs, step)
        # A stream of its own: on the one that trains, copies would queue after the kernels of the present step.
        with torch.cuda.stream(self._stream):
            if begun is not None:
                self._stream.wait_event(begun)
            return self._prepare(packs, step)
