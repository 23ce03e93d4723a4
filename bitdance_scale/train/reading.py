"""The data of a run, step by step: the loader, and the packs of each step on every rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.data_errors import ErrorCause
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.plan.filters import FilterCount
from bitdance_scale.data.plan.plan import StreamUse
from bitdance_scale.parallel.agreement import all_ranks
from bitdance_scale.parallel.broadcast import ReadStep, SharedStep, share_step
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.tokens import TextTokenizer
from bitdance_scale.vision.tokenizer import VisionTokenizer


@dataclass(frozen=True)
class StepReport:
    """What the reader of a replica says of a step.

    Attributes:
        loader: state that resumes after the step, JSON values.
        images_by_resolution: resolution (`side_px`) -> images planned in the global batch.
        sample_errors: cause (`data_errors.ErrorCause`) -> images of this replica with it.
        num_ready: steps that this replica had read ahead.
        wait_s: seconds that this replica waited for its loader.
        images_by_source: name of the source -> images planned since the start of the run; empty with `data.shards`.
    """

    loader: dict[str, object]
    images_by_resolution: dict[int, int]
    sample_errors: dict[ErrorCause, int]
    num_ready: int
    wait_s: float
    images_by_source: dict[str, int] = dataclasses.field(default_factory=dict)


class StepReader:
    """The packs of every step, read by one rank of each replica and known to all of its ranks.

    A context manager. An error of any reader is raised on all ranks of the job.

    Args:
        config: the run.
        index: the data set, from `shared_index.py`.
        text: text tokenizer.
        vision: encodes the images.
        topology: the ranks.
        state: loader state to go on from, JSON values; None starts at step 0.
    """

    def __init__(
        self,
        config: RunConfig,
        index: Index,
        text: TextTokenizer,
        vision: VisionTokenizer,
        topology: Topology,
        state: dict[str, object] | None,
    ) -> None:
        self._vision, self._topology = vision, topology
        self._loader: Loader | None = None
        with all_ranks():
            if topology.is_reader:
                resumed = None if state is None else LoaderState.from_dict(state)
                self._loader = Loader(config, text, index, topology.data_rank, topology.data_size, resumed)

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._loader is not None:
            self._loader.close()

    def uses(self, num_steps: int) -> list[StreamUse]:
        """What so many steps take of every source, on a rank that reads (the first one does); elsewhere nothing."""
        return [] if self._loader is None else self._loader.plan.uses(num_steps)

    def filter_counts(self) -> dict[str, list[FilterCount]]:
        """What the filters leave out, by source, on a rank that reads; elsewhere nothing."""
        return {} if self._loader is None else self._loader.plan.filter_counts()

    def next_step(self) -> SharedStep:
        """The packs of the next step with their images encoded; the report is a `StepReport`."""
        read = None
        with all_ranks():
            if self._loader is not None:
                read = self._read(self._loader)
        return share_step(read, self._vision, self._topology)

    @staticmethod
    def _read(loader: Loader) -> ReadStep:
        step = loader.next_step()
        report = StepReport(
            loader=step.state.to_dict(),
            images_by_resolution=step.images_by_resolution,
            sample_errors=dict(step.sample_errors),
            num_ready=step.num_ready,
            wait_s=step.wait_s,
            images_by_source=step.images_by_source,
        )
        return ReadStep([loaded.pack for loaded in step.packs], [loaded.images for loaded in step.packs], report)
