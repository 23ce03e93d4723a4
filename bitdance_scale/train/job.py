"""A job: one kind of training, as the skeleton of a run (`run.py`) sees it, and how its checkpoints come and go."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bitdance_scale.checkpoint.background_save import CheckpointSaver
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.remote_copies import RemoteCopies
from bitdance_scale.checkpoint.remote_restore import find_latest
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR, step_of
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.resuming import Change, changes_losses
from bitdance_scale.config.schema import CheckpointSection, ObserveSection
from bitdance_scale.errors import DamagedCheckpointError
from bitdance_scale.observe.profiler import StepProfiler
from bitdance_scale.parallel.agreement import on_first_rank
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.parallel.topology import Topology, make_host_group
from bitdance_scale.phases import Phase, phase
from bitdance_scale.train.config_file import write_config
from bitdance_scale.train.last_save import LocalErrors
from bitdance_scale.train.process import record_step
from bitdance_scale.train.step_guards import GuardSection, StepGuards

logger = logging.getLogger(__name__)


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
        benchmarks: each of the benchmarks that are scored.
        draws_start: whether pictures are drawn before the first step too, with the weights that the run starts from.
    """

    num_steps: int
    log: int
    save: int
    evaluate: int
    draw: int
    benchmarks: tuple[int, ...] = ()
    draws_start: bool = False


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
        profiler: profiles the steps that `[observe]` names on this rank.
    """

    remote: RemoteCopies | None = None

    # Of a job that is made without a configuration.
    profiler = StepProfiler((), Path(), 0, is_cuda=False)

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
            self.checkpoints, topology.device, is_background=section.in_background, committed=self._committed
        )
        self._falls_back = section.fall_back
        self.guards = StepGuards(config.optim)
        self.local_errors = LocalErrors()
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

    def draw_start(self) -> None:
        """Draws pictures before the first step, where the schedule has them."""
        raise NotImplementedError(f"{type(self).__name__} schedules pictures of its start and cannot draw them")

    def score(self, number: int) -> None:
        """Draws and scores a benchmark of the schedule, by its number there."""
        raise NotImplementedError(f"{type(self).__name__} schedules benchmark {number} and cannot score it")

    def lacking_scores(self) -> Sequence[int]:
        """Benchmarks that are due after this step and have no score of it, as the run ended before; a collective."""
        return ()

    @abc.abstractmethod
    def pause(self) -> None:
        """Leaves out of the speeds what happened since the last step: a checkpoint, an evaluation, pictures, scores."""

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
        """Exports, and says where everything is, after the last step; a collective.

        Raises:
            Exception: on all ranks, what went wrong on any.
        """

    @abc.abstractmethod
    def complete(self) -> None:
        """Makes what a run lacks that was killed between its last checkpoint and its end; raises as `finish` does."""

    def write_config(self) -> None:
        """Writes config.toml, and keeps what it was where a resumed run has other settings.

        A job calls it when its session is open: a refused start leaves the file as it is.
        """
        on_first_rank(lambda: write_config(self.run_folder, self._config_text, self.step))

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

    def restore_guards(self, state: Mapping[str, Any], told: Sequence[Change]) -> None:
        """Goes on with what a checkpoint's guards remember, and says what is trained in another way from here on.

        Args:
            state: `guards` of the checkpoint.
            told: the changed settings, as `check_resume` returns them.
        """
        if told:
            logger.info("resumed with changed settings: %s", ", ".join(map(str, told)))
        keeps_windows = not changes_losses(told)
        self.guards.restore(state, keeps_windows=keeps_windows)
        if not keeps_windows and self.guards.judges_spikes:
            logger.info("the loss may be another from here on: the windows of the rule on spikes begin again")

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

    def _committed(self, path: Path) -> None:
        """What follows a commit; in the thread that saves."""
        step = step_of(path.name)
        if self.topology.rank == 0 and step is not None:
            record_step(step)
        if self.remote is not None:
            self.remote.upload(path)

    @property
    def has_failed_save(self) -> bool:
        """Whether a checkpoint in the background has failed, as far as this rank knows; `settle` raises it."""
        return self._saver.has_failed

    def is_due(self, every_steps: int) -> bool:
        """Whether something done every so many steps, and after the last one, is due now."""
        return every_steps > 0 and (self.step % every_steps == 0 or self.is_complete)
