"""The skeleton of every training run: start, resume, loop, what is due when, stop, end.

A job says what a step is, what is evaluated, drawn and exported (`text_to_image.py`, `tokenizer.py`); everything else
of a run is here, once. All ranks call everything alike.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch.distributed as dist

from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.background_save import CheckpointSaver
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.remote_copies import RemoteCopies
from bitdance_scale.checkpoint.remote_restore import find_latest
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import CheckpointSection, ParallelSection
from bitdance_scale.errors import BitDanceError, ConfigError, DamagedCheckpointError
from bitdance_scale.observe.console import setup_logging
from bitdance_scale.parallel.agreement import all_ranks, any_rank_each
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.parallel.topology import (
    DEFAULT_TIMEOUT_S,
    Topology,
    end_process_group,
    make_host_group,
    make_topology,
    set_timeout_of_all_groups,
    start_process_group,
)
from bitdance_scale.phases import POSITION, Phase, phase
from bitdance_scale.train.heartbeat import Heartbeat
from bitdance_scale.train.last_save import LocalErrors, save_after_fault
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest
from bitdance_scale.train.run_lock import RunLock
from bitdance_scale.train.step_guards import GuardSection, StepGuards

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
CONFIG_FILE = "config.toml"
FLIGHT_RECORDS_DIR = "flight_records"
COPY_WAIT_S = 1800.0
"""How long a finished run waits for the copies of its checkpoints."""
STOP_COPY_WAIT_S = 30.0
"""The same of a run that was asked to stop; when it goes on, so does the copy."""
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

    @property
    def timeout_s(self) -> float:
        """Seconds without progress in a step after which the run counts as hung; 0: never."""

    @property
    def long_timeout_s(self) -> float:
        """The same of what takes longer, and the timeout of collectives."""


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
    def optim(self) -> GuardSection:
        """Section `[optim]`, of which every job has the rules on skipped steps and spikes."""


@dataclass(frozen=True)
class Schedule:
    """After how many steps something is done, and after the last step in any case; 0: never.

    Attributes:
        num_steps: optimiser steps of the run.
        log: metrics.
        save: checkpoints.
        evaluate: evaluation on held-out data.
        draw: pictures.
    """

    num_steps: int
    log: int
    save: int
    evaluate: int
    draw: int


class Job(abc.ABC):
    """One kind of training on this rank: the model under its layout, its data, its folder.

    Building a job resumes the newest checkpoint of the run folder, if there is one.

    Args:
        config: the run, checked.
        topology: the ranks.
        run_folder: `<run.root>/<run.name>`.

    Attributes:
        step: optimiser steps taken.
        guards: the rules on the numbers of a step; their state belongs to `state`.
        local_errors: those of what this rank does alone, kept until all ranks can hear of them.
        remote: the copies of its checkpoints; None without `checkpoint.upload`.
    """

    remote: RemoteCopies | None = None

    def __init__(self, config: JobConfig, topology: Topology, run_folder: Path) -> None:
        self.topology, self.run_folder = topology, run_folder
        section = config.checkpoint
        self.checkpoints = CheckpointFolder(
            run_folder / CHECKPOINTS_DIR,
            keep=section.keep,
            keep_every_steps=section.keep_every_steps,
            is_busy=lambda step: self.remote is not None and self.remote.is_uploading(step),
            group=make_host_group(),
        )
        if section.upload:
            where = f"{section.upload.rstrip('/')}/{config.run.name}"
            self.remote = RemoteCopies(where, section, group=self.checkpoints.group)
        self._saver = CheckpointSaver(
            self.checkpoints, topology.device, is_background=section.in_background, committed=self._copy
        )
        self._falls_back = section.fall_back
        self.guards = StepGuards(config.optim)
        self.local_errors = LocalErrors()
        self._config_text = dump_toml(config)
        self._saved_step = 0

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
        """Trains one step on what was read and counts it; returns whether it was skipped: it changed nothing."""

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

    @property
    def is_complete(self) -> bool:
        """Whether the last configured step has been taken."""
        return self.step >= self.schedule.num_steps

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from, fetched where only a copy of it is left; None: it begins.

        Raises:
            CheckpointError: on all ranks: it is damaged, and no older one is to be taken; or there is none, and its
                copies cannot be reached.
        """
        return find_latest(self.checkpoints, self.remote, falls_back=self._falls_back)

    def load_newest(self, path: Path, load: Callable[[Path], None]) -> None:
        """Loads a checkpoint, or an older one where its tensors turn out damaged and the run falls back.

        Args:
            path: of `newest_checkpoint`.
            load: loads one; it raises DamagedCheckpointError, before it changes anything, on all ranks.
        """
        while True:
            try:
                load(path)
            except DamagedCheckpointError as error:
                path = self.checkpoints.retreat(path, str(error), falls_back=self._falls_back)
            else:
                logger.info("resumed from %s", path)
                return

    def prepare_saves(self) -> None:
        """Takes the host memory for checkpoints in the background."""
        self._saver.prepare(self.model_values(), self.optimizer_values())

    def save(self) -> None:
        """Saves a checkpoint of the present step, unless there is one; it may be committed later, in the background.

        Raises:
            CheckpointError: on all ranks: this one, or the one before it, was not committed.
        """
        if self._saved_step == self.step:
            return
        with phase(Phase.SAVING):
            self._saver.save(self.state(), self.model_values(), self.optimizer_values(), self._config_text)
        self._saved_step = self.step

    def settle(self) -> None:
        """Returns when no checkpoint is being written.

        Raises:
            CheckpointError: on all ranks: it was not committed.
        """
        with phase(Phase.SAVING):
            self._saver.wait()

    def end_copies(self, wait_s: float) -> None:
        """Waits for the copies of checkpoints, for so many seconds at most, and ends them."""
        if self.remote is not None:
            self.remote.close(wait_s)

    def _copy(self, path: Path) -> None:
        if self.remote is not None:
            self.remote.upload(path)

    @property
    def has_failed_save(self) -> bool:
        """Whether a checkpoint in the background has failed, as far as this rank knows; `settle` raises it."""
        return self._saver.has_failed

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
    with opened_run(config.run, parallel, folder) as (topology, heartbeat), StopRequest() as stop:
        job = make_job(topology, folder)
        set_timeout_of_all_groups(config.run.long_timeout_s)
        heartbeat.resumed(job.step)
        if job.is_complete:
            job.complete()
            with phase(Phase.ENDING):
                job.end_copies(COPY_WAIT_S)
            logger.info(
                "the run %s is complete at step %d; extend it with run.steps=%d, or start another with run.name=NAME",
                folder,
                job.step,
                2 * config.run.steps,
            )
            return EXIT_COMPLETE
        if topology.rank == 0:
            write_text(folder / CONFIG_FILE, dump_toml(config))
        is_complete = train(job, stop)
        with phase(Phase.ENDING):
            if not is_complete:
                logger.warning("stopped on request after step %d and saved; run again to go on", job.step)
                job.end_copies(STOP_COPY_WAIT_S)
                # All leave together: torchrun kills the others soon after the first that ends with a code, and the
                # first rank may take longer over closing its W&B run.
                dist.barrier()
                return EXIT_REQUEUE
            job.finish()
            job.end_copies(COPY_WAIT_S)
    return EXIT_COMPLETE


def train(job: Job, stop: StopRequest) -> bool:
    """Trains to the last step and saves; returns False when a request to stop came first (saved as well).

    A fault that leaves the state between two steps whole on all ranks saves it before it is raised.

    Raises:
        TrainingError: too many steps were skipped (`step_guards.py`); nothing is saved.
        DataError: too much of the data cannot be read; what was trained until then is saved.
        CheckpointError: a checkpoint was not committed.
    """
    with job.session():
        try:
            job.prepare_saves()
            if job.step == 0:
                with phase(Phase.EVALUATING):
                    job.evaluate()
                job.pause()
            is_complete = _train_steps(job, stop)
            job.settle()
        except BitDanceError:
            # Raised on all ranks, which have saved where that makes sense.
            raise
        except Exception:
            save_after_fault(job)
            raise
    return is_complete


def _train_steps(job: Job, stop: StopRequest) -> bool:
    schedule, local_errors = job.schedule, job.local_errors
    while not job.is_complete:
        POSITION.move(Phase.READING, job.step)
        try:
            job.read()
        except BitDanceError:
            # Raised on all ranks. Nothing is wrong with the steps before this one.
            job.save()
            job.settle()
            raise
        is_skipped = job.take_step()
        POSITION.is_updating = False
        job.guards.count(job.step, is_skipped)
        if job.is_due(schedule.log):
            with phase(Phase.LOGGING):
                job.log()
        is_stop_asked, has_failed_save, has_local_error = any_rank_each(
            [stop.is_requested, job.has_failed_save, local_errors.has_any]
        )
        if has_failed_save:
            job.settle()
        if has_local_error or is_stop_asked:
            job.save()
            job.settle()
            local_errors.raise_on_all_ranks()
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
    local_errors.raise_on_all_ranks()
    return True


@contextlib.contextmanager
def opened_run(section: NamedRun, parallel: ParallelSection, folder: Path) -> Iterator[tuple[Topology, Heartbeat]]:
    """The ranks of a run, which hold its folder and beat, while the block runs.

    Args:
        section: `[run]`.
        parallel: layout of a replica.
        folder: run folder, made here; this process writes its log files into it.

    Raises:
        ConfigError: on all ranks: another process trains in the run folder, or it cannot be written.
    """
    with (
        joined_ranks(parallel, section.long_timeout_s, folder / FLIGHT_RECORDS_DIR) as topology,
        contextlib.ExitStack() as opened,
        Heartbeat(folder, section.timeout_s, section.long_timeout_s) as heartbeat,
    ):
        with all_ranks():
            try:
                if topology.rank == 0:
                    lock = opened.enter_context(RunLock(folder))
                    heartbeat.actions.append(lock.beat)
                setup_logging(folder, topology.rank)
            except OSError as error:
                raise ConfigError(
                    f"run.root = {str(folder.parent)!r}: the run folder {folder} cannot be written ({error}); name a "
                    "writable folder"
                ) from error
        if topology.rank == 0 and lock.taken_over:
            logger.warning(lock.taken_over)
        yield topology, heartbeat


@contextlib.contextmanager
def joined_ranks(
    parallel: ParallelSection, timeout_s: float = DEFAULT_TIMEOUT_S, recorder_folder: Path | None = None
) -> Iterator[Topology]:
    """The ranks of this job while the block runs; a process that torchrun did not start is a job of one.

    Args:
        parallel: layout of a replica.
        timeout_s: seconds after which a collective fails.
        recorder_folder: of the flight recorder's files; None: none of ours.
    """
    alone = {} if "RANK" in os.environ else _ALONE
    os.environ |= alone
    start_process_group(timeout_s, recorder_folder)
    try:
        yield make_topology(parallel, timeout_s)
    finally:
        end_process_group()
        for name in alone:
            del os.environ[name]
