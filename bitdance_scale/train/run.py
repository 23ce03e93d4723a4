"""The skeleton of every training run: start, resume, loop, what is due when, stop, end.

A job (`job.py`) says what a step is, what is evaluated, drawn and exported (`text_to_image.py`, `tokenizer.py`);
everything else of a run is here, once. All ranks call everything alike.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.float32_products import set_float32_products
from bitdance_scale.observe.console import setup_logging
from bitdance_scale.parallel.agreement import all_ranks, any_rank, any_rank_each
from bitdance_scale.parallel.topology import (
    DEFAULT_TIMEOUT_S,
    Topology,
    end_process_group,
    make_topology,
    set_timeout_of_all_groups,
    start_process_group,
)
from bitdance_scale.phases import POSITION, Phase, phase
from bitdance_scale.train.heartbeat import Heartbeat
from bitdance_scale.train.job import Job, JobConfig, NamedRun
from bitdance_scale.train.last_save import let_save_end, save_after_fault
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest
from bitdance_scale.train.run_lock import RunLock

logger = logging.getLogger(__name__)

FLIGHT_RECORDS_DIR = "flight_records"
COPY_WAIT_S = 1800.0
"""How long a finished run waits for the copies of its checkpoints."""
STOP_COPY_WAIT_S = 30.0
"""The same of a run that was asked to stop; when it goes on, so does the copy."""
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun would tell the only process of a job."""


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
        is_complete = train(job, stop)
        with phase(Phase.ENDING):
            if not is_complete:
                logger.warning("stopped on request after step %d and saved; run again to go on", job.step)
                job.end_copies(STOP_COPY_WAIT_S)
                # All leave together: torchrun kills the others soon after the first that ends with a code, and the
                # first rank may take longer over closing its W&B run.
                any_rank(False)
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
    with job.session(), job.profiler, _collected_between_steps():
        try:
            job.prepare_saves()
            if job.step == 0:
                if job.schedule.draws_start:
                    with phase(Phase.DRAWING):
                        job.draw_start()
                with phase(Phase.EVALUATING):
                    job.evaluate()
                job.pause()
            for number in job.lacking_scores():
                with phase(Phase.EVALUATING):
                    job.score(number)
                job.pause()
            is_complete = _train_steps(job, stop)
            job.settle()
        except BitDanceError:
            # Raised on all ranks, which have saved where that makes sense.
            let_save_end(job)
            raise
        except Exception:
            save_after_fault(job)
            let_save_end(job)
            raise
    return is_complete


def _train_steps(job: Job, stop: StopRequest) -> bool:
    schedule, local_errors = job.schedule, job.local_errors
    while not job.is_complete:
        POSITION.move(Phase.READING, job.step)
        job.profiler.begin(job.step + 1)
        try:
            job.read()
        except BitDanceError:
            # Raised on all ranks. Nothing is wrong with the steps before this one.
            job.save()
            job.settle()
            raise
        is_skipped = job.take_step()
        POSITION.is_updating = False
        job.profiler.end()
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
        # The page that follows an evaluation may show the pictures.
        if job.is_due(schedule.draw):
            with phase(Phase.DRAWING):
                job.draw()
        if job.is_due(schedule.evaluate):
            with phase(Phase.EVALUATING):
                job.evaluate()
        for number, every_steps in enumerate(schedule.benchmarks):
            if job.is_due(every_steps):
                with phase(Phase.EVALUATING):
                    job.score(number)
        gc.collect()
        job.pause()
    local_errors.raise_on_all_ranks()
    return True


@contextlib.contextmanager
def _collected_between_steps() -> Iterator[None]:
    """Within it Python collects garbage only when it is asked to, which is after every step, on all ranks at once.

    Left alone, each rank stops whenever it has made enough objects, and all others wait for it. A whole collection
    took 0.2 s for the 424,000 objects of the demo's start; without these, which stay, it takes a millisecond.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


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
    # PyTorch lets convolutions use TF32. What may is said where it is used (`vision.precision`).
    set_float32_products("float32")
    start_process_group(timeout_s, recorder_folder)
    try:
        yield make_topology(parallel, timeout_s)
    finally:
        end_process_group()
        for name in alone:
            del os.environ[name]
