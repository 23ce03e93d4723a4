"""The skeleton of every training run: start, resume, loop, what is due when, stop, end.

A job says what a step is, what is evaluated, drawn and exported (`text_to_image.py`, `tokenizer.py`); everything else
of a run is here, once. All ranks call everything alike.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch.distributed as dist

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import save_checkpoint
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import CheckpointSection, ObserveSection, ParallelSection
from bitdance_scale.errors import BitDanceError, ConfigError, TrainingError
from bitdance_scale.observe.console import setup_logging
from bitdance_scale.observe.profiler import StepProfiler
from bitdance_scale.parallel.agreement import all_ranks, any_rank, on_first_rank
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.parallel.topology import Topology, end_process_group, make_topology, start_process_group
from bitdance_scale.phases import POSITION, Phase, phase
from bitdance_scale.train.config_file import write_config
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest, record_step

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun would tell the only process of a job."""


class NamedRun(Protocol):
    """The settings of `[run]` that every job has."""

    @property
    def name(self) -> str:
        """Name of the run folder."""

    @property
    def root(self) -> str:
        """Folder of the run folders."""

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""


class JobConfig(Protocol):
    """What every job's configuration has; it is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def run(self) -> NamedRun:
        """Section `[run]`."""

    @property
    def checkpoint(self) -> CheckpointSection:
        """Section `[checkpoint]`."""

    @property
    def observe(self) -> ObserveSection:
        """Section `[observe]`."""


@dataclass(frozen=True)
class Schedule:
    """After how many steps something is done, and after the last step in any case; 0: never.

    Attributes:
        num_steps: optimiser steps of the run.
        log: metrics.
        save: checkpoints.
        evaluate: evaluation on held-out data.
        draw: pictures.
        max_skipped_steps: steps in a row whose gradient may be not finite.
    """

    num_steps: int
    log: int
    save: int
    evaluate: int
    draw: int
    max_skipped_steps: int


class Job(abc.ABC):
    """One kind of training on this rank: the model under its layout, its data, its folder.

    Building a job resumes the newest checkpoint of the run folder, if there is one.

    Args:
        config: the run, checked.
        topology: the ranks.
        run_folder: `<run.root>/<run.name>`.

    Attributes:
        step: optimiser steps taken.
        profiler: profiles the steps that `[observe]` names on this rank.
    """

    # Of a job that is made without a configuration.
    profiler = StepProfiler((), Path(), 0, is_cuda=False)

    def __init__(self, config: JobConfig, topology: Topology, run_folder: Path) -> None:
        self.topology, self.run_folder = topology, run_folder
        self.checkpoints = CheckpointFolder(run_folder / CHECKPOINTS_DIR, keep=config.checkpoint.keep)
        self._config_text = dump_toml(config)
        observe, is_cuda = config.observe, topology.device.type == "cuda"
        steps = observe.profile_steps if topology.rank in observe.profile_ranks else ()
        self.profiler = StepProfiler(steps, run_folder, topology.rank, is_cuda=is_cuda)
        self._saved_step = 0
        on_first_rank(self.checkpoints.remove_deleted)

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Optimiser steps taken, skipped ones included."""

    @property
    @abc.abstractmethod
    def schedule(self) -> Schedule:
        """What is due when."""

    @abc.abstractmethod
    def session(self) -> AbstractContextManager[object]:
        """Opens what training needs until its end: the data and the sinks of the metrics."""

    @abc.abstractmethod
    def read(self) -> None:
        """Takes the data of the next step.

        Raises:
            BitDanceError: on all ranks; the state is that after the last step, and can be saved.
        """

    @abc.abstractmethod
    def take_step(self) -> bool:
        """Trains one step on what was read and counts it; returns whether it was skipped for a non-finite gradient."""

    @abc.abstractmethod
    def log(self) -> None:
        """Writes the metrics of the steps since the last call."""

    @abc.abstractmethod
    def evaluate(self) -> None:
        """Evaluates on held-out data and writes the result."""

    @abc.abstractmethod
    def draw(self) -> None:
        """Draws pictures with the model as it is."""

    @abc.abstractmethod
    def pause(self) -> None:
        """Leaves out of the speeds what happened since the last step: a checkpoint, an evaluation, pictures."""

    @abc.abstractmethod
    def state(self) -> Any:
        """How far the run is: a dataclass of JSON values with the field `step`."""

    @abc.abstractmethod
    def model_values(self) -> Mapping[str, ShardedValue]:
        """What this rank holds of the parameters, by global name."""

    @abc.abstractmethod
    def optimizer_values(self) -> Mapping[str, ShardedValue]:
        """What this rank holds of the optimiser's state."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Exports, and says where everything is, after the last step."""

    @abc.abstractmethod
    def complete(self) -> None:
        """Makes what a run lacks that was killed between its last checkpoint and its end."""

    def write_config(self) -> None:
        """Writes config.toml, and keeps what it was where a resumed run has other settings.

        A job calls it when its session is open: a refused start leaves the file as it is.
        """
        on_first_rank(lambda: write_config(self.run_folder, self._config_text, self.step))

    @property
    def is_complete(self) -> bool:
        """Whether the last configured step has been taken."""
        return self.step >= self.schedule.num_steps

    def save(self) -> None:
        """Commits a checkpoint of the present step, unless there is one."""
        if self._saved_step == self.step:
            return
        begun_s = time.monotonic()
        with phase(Phase.SAVING):
            save_checkpoint(
                self.checkpoints, self.state(), self.model_values(), self.optimizer_values(), self._config_text
            )
        self._saved_step = self.step
        if self.topology.rank == 0:
            record_step(self.step)
        logger.info("checkpoint of step %d written in %.1f s", self.step, time.monotonic() - begun_s)

    def is_due(self, every_steps: int) -> bool:
        """Whether something done every so many steps, and after the last one, is due now."""
        return every_steps > 0 and (self.step % every_steps == 0 or self.is_complete)


def run_job(config: JobConfig, parallel: ParallelSection, make_job: Callable[[Topology, Path], Job]) -> int:
    """Runs a job to its end in this process, one rank of a torchrun job or a job of one process.

    Args:
        config: the run, checked.
        parallel: layout of a replica.
        make_job: builds the job; called once the process groups are there.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks.
    """
    folder = Path(config.run.root) / config.run.name
    with joined_ranks(parallel, folder) as topology, StopRequest() as stop:
        job = make_job(topology, folder)
        if job.is_complete:
            job.complete()
            logger.info(
                "the run %s is complete at step %d; extend it with run.steps=%d, or start another with run.name=NAME",
                folder,
                job.step,
                2 * config.run.steps,
            )
            return EXIT_COMPLETE
        if not train(job, stop):
            logger.warning("stopped on request after step %d and saved; run again to go on", job.step)
            # All leave together: torchrun kills the others soon after the first that ends with a code, and the first
            # rank may take longer over closing its W&B run.
            dist.barrier()
            return EXIT_REQUEUE
        with all_ranks():
            job.finish()
    return EXIT_COMPLETE


def train(job: Job, stop: StopRequest) -> bool:
    """Trains to the last step and saves; returns False when a request to stop came first (saved as well).

    Raises:
        TrainingError: gradients stayed non-finite for more than `Schedule.max_skipped_steps` steps.
        DataError: too much of the data cannot be read; what was trained until then is saved.
    """
    schedule, num_skipped_in_a_row = job.schedule, 0
    with job.session(), job.profiler:
        if job.step == 0:
            with phase(Phase.EVALUATING):
                job.evaluate()
            job.pause()
        while not job.is_complete:
            POSITION.move(Phase.READING, job.step)
            job.profiler.begin(job.step + 1)
            try:
                job.read()
            except BitDanceError:
                # Raised on all ranks. Nothing is wrong with the steps before this one.
                job.save()
                raise
            num_skipped_in_a_row = num_skipped_in_a_row + 1 if job.take_step() else 0
            job.profiler.end()
            if num_skipped_in_a_row > schedule.max_skipped_steps:
                raise TrainingError(
                    f"step {job.step}: the gradient was not finite in {num_skipped_in_a_row} consecutive steps "
                    f"(optim.max_skipped_steps = {schedule.max_skipped_steps}). The last checkpoint is sound: resume "
                    "from it with a lower optim.lr, or look for damaged samples in the steps before."
                )
            if job.is_due(schedule.log):
                with phase(Phase.LOGGING):
                    job.log()
            if any_rank(stop.is_requested):
                job.save()
                return False
            if job.is_due(schedule.save):
                job.save()
            if job.is_due(schedule.evaluate):
                with phase(Phase.EVALUATING):
                    job.evaluate()
            if job.is_due(schedule.draw):
                with phase(Phase.DRAWING):
                    job.draw()
            job.pause()
    return True


@contextlib.contextmanager
def joined_ranks(
    parallel: ParallelSection, folder: Path | None = None, timeout_s: float | None = None
) -> Iterator[Topology]:
    """The ranks of this job while the block runs; a process that torchrun did not start is a job of one.

    Args:
        parallel: layout of a replica.
        folder: run folder, made here, whose log files this process writes; None: no log files.
        timeout_s: seconds after which a collective fails; None: the default.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    alone = {} if "RANK" in os.environ else _ALONE
    os.environ |= alone
    if folder is not None:
        try:
            setup_logging(folder, int(os.environ["RANK"]))
        except OSError as error:
            raise ConfigError(
                f"run.root = {str(folder.parent)!r}: the run folder {folder} cannot be written ({error}); name a "
                "writable folder"
            ) from error
    start_process_group(**({} if timeout_s is None else {"timeout_s": timeout_s}))
    try:
        yield make_topology(parallel)
    finally:
        end_process_group()
        for name in alone:
            del os.environ[name]
