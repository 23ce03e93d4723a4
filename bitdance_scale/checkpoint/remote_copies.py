"""Copies a run's checkpoints to S3 while it trains: in the background, and never at the cost of the run.

Every rank copies its share of a checkpoint's files in a thread of its own. The threads do not talk to each other: the
first rank's looks at the list of objects until all files are there, and then writes the marker
(`checkpoint/remote_folder.py`). A copy that fails is tried again for a while and then given up with a warning; the next
checkpoint is copied as usual.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from bitdance_scale.checkpoint.integrity import MANIFEST_NAME, Manifest, ManifestError, read_manifest, share_out
from bitdance_scale.checkpoint.remote_folder import RemoteFolder, open_remote
from bitdance_scale.checkpoint.step_names import STEP_NAME
from bitdance_scale.config.schema import CheckpointSection
from bitdance_scale.data.storage.store_contract import WriteError
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.agreement import any_rank
from bitdance_scale.phases import POSITION
from bitdance_scale.wording import file_size

logger = logging.getLogger(__name__)

COPY_DEADLINE_S = 1800.0
"""How long a copy may stand still before it is given up."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_POLL_S = 5.0
_JOIN_S = 5.0


@dataclass(frozen=True)
class CopyStatus:
    """How the copies are, as this rank sees it; the first rank sees all.

    Attributes:
        copied_step: the newest step that this process has copied; None: none yet.
        waiting_steps: steps that are being copied or wait for it.
        num_failed: copies that were given up.
        problem: the last thing that went wrong; empty since a copy that succeeded.
    """

    copied_step: int | None = None
    waiting_steps: tuple[int, ...] = ()
    num_failed: int = 0
    problem: str = ""


@dataclass
class _Job:
    """A checkpoint to copy. `number` counts the calls of `upload`, the same on all ranks."""

    number: int
    folder: Path
    step: int = field(init=False)

    def __post_init__(self) -> None:
        match = STEP_NAME.fullmatch(self.folder.name)
        assert match is not None, f"{self.folder} is no committed checkpoint"
        self.step = int(match[1])


class _Ended(Exception):
    """The process does not wait for the copy any longer."""


class RemoteCopies:
    """The copies of one run's checkpoints, made in the background.

    Args:
        where: `s3://BUCKET/PREFIX` of this run's copies.
        section: access, rate and which copies stay.
        group: the ranks of the run; None: all, or this process alone without a process group.
        deadline_s: how long a copy may stand still before it is given up.
        poll_s: seconds between two looks at what other ranks have copied.

    Attributes:
        folder: the copies.

    Raises:
        DataError: the section does not give a client for S3.
    """

    def __init__(
        self,
        where: str,
        section: CheckpointSection,
        *,
        group: dist.ProcessGroup | None = None,
        deadline_s: float = COPY_DEADLINE_S,
        poll_s: float = _POLL_S,
    ) -> None:
        has_ranks = dist.is_initialized()
        self._rank, self._num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if has_ranks else (0, 1)
        self.folder: RemoteFolder = open_remote(where, section, num_ranks=self._num_ranks, pause=self._pause)
        self._keep, self._keep_every, self._group = section.upload_keep, section.keep_every_steps, group
        self._deadline_s, self._poll_s = deadline_s, poll_s
        self._changed = threading.Condition()
        self._has_ended = threading.Event()
        self._queue: list[_Job] = []
        self._num_queued = self._num_begun = 0
        self._copied_step: int | None = None
        self._num_failed, self._problem = 0, ""
        # When a file last arrived; only the thread looks at it.
        self._moved_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def status(self) -> CopyStatus:
        """How the copies are now."""
        with self._changed:
            steps = tuple(job.step for job in self._queue)
            return CopyStatus(self._copied_step, steps, self._num_failed, self._problem)

    def steps(self) -> list[int]:
        """Steps with a copy, in ascending order; no collective.

        Raises:
            CheckpointError: S3 cannot be reached.
        """
        return self.folder.steps()

    def is_uploading(self, step: int) -> bool:
        """Whether a checkpoint is being copied or waits for it; on the first rank until all ranks have done so."""
        return step in self.status.waiting_steps

    def upload(self, folder: Path) -> None:
        """Begins to copy a committed checkpoint, after what is being copied; returns at once. A collective of one flag.

        A checkpoint whose copy has not begun on any rank is left out for this one. Nothing that happens to the copy is
        raised.

        Args:
            folder: the checkpoint, such as `step_00000100`.
        """
        # Held while the ranks agree, so that none of them begins what the others leave out.
        with self._changed:
            has_begun = any_rank(self._num_begun >= self._num_queued, self._group)
            if not has_begun:
                left_out = self._queue.pop()
                if self._rank == 0:
                    logger.info("the checkpoint of step %d is not copied: a newer one is there", left_out.step)
            self._num_queued += 1
            self._queue.append(_Job(self._num_queued, Path(folder)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint copies", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, wait_s: float) -> None:
        """Waits for the copies for so many seconds, gives up what is left, and says so; no collective.

        A copy that is given up goes on from what is there when the run starts again.
        """
        with self._changed:
            if self._queue and self._rank == 0:
                logger.info("copying the checkpoint of step %d to %s", self._queue[-1].step, self.folder.where)
            end_s = time.monotonic() + wait_s
            while self._queue and (left_s := end_s - time.monotonic()) > 0:
                self._changed.wait(min(left_s, self._poll_s))
                # A wait that ends by itself is no hang, however long it is.
                POSITION.move(POSITION.phase)
            left = [job.step for job in self._queue]
        self._has_ended.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        if left:
            logger.warning(
                "checkpoint.upload: the copy of step %s to %s was not finished in %.0f s; start the run again to go on "
                "with it, or copy the folder by hand",
                ", ".join(map(str, left)),
                self.folder.where,
                wait_s,
            )

    def _work(self) -> None:
        """The thread: one copy after another, until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._has_ended.is_set())
                if self._has_ended.is_set():
                    return
                job = self._queue[0]
                self._num_begun = job.number
            problem = self._try(job)
            with self._changed:
                if self._has_ended.is_set():
                    return
                self._queue.remove(job)
                self._problem = problem
                if problem:
                    self._num_failed += 1
                else:
                    self._copied_step = job.step
                self._changed.notify_all()

    def _try(self, job: _Job) -> str:
        """Copies a checkpoint, again and again while anything may come of it; returns what was wrong, or nothing."""
        begun_s = self._moved_s = time.monotonic()
        num_failures = 0
        while True:
            try:
                num_bytes = self._copy(job)
                break
            except _Ended:
                return "the run has ended"
            except (CheckpointError, WriteError, ManifestError) as error:
                problem = str(error)
            except Exception as error:  # noqa: BLE001  (whatever it is, training goes on)
                problem = f"{type(error).__name__}: {error}"
            if not job.folder.is_dir():
                return self._give_up(job, "its folder was deleted meanwhile", problem)
            if time.monotonic() - self._moved_s > self._deadline_s:
                return self._give_up(job, f"given up after {time.monotonic() - begun_s:.0f} s", problem)
            if num_failures == 0:
                logger.warning("checkpoint.upload: step %d: %s; trying again", job.step, problem)
            with self._changed:
                self._problem = problem
            try:
                self._pause(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**num_failures)))
            except _Ended:
                return problem
            num_failures += 1
        if self._rank == 0:
            size, where, elapsed_s = file_size(num_bytes), self.folder.where, time.monotonic() - begun_s
            logger.info("checkpoint of step %d copied to %s, %s in %.1f s", job.step, where, size, elapsed_s)
        return ""

    def _give_up(self, job: _Job, why: str, problem: str) -> str:
        logger.warning(
            "checkpoint.upload: the checkpoint of step %d was not copied, %s: %s. Training goes on; the next one will "
            "be copied as usual",
            job.step,
            why,
            problem,
        )
        return problem

    def _copy(self, job: _Job) -> int:
        """Copies this rank's share, and on the first rank the marker when all shares are there; returns all bytes."""
        content = (job.folder / MANIFEST_NAME).read_bytes()
        manifest = read_manifest(content, str(job.folder / MANIFEST_NAME))
        sizes = {name: file.num_bytes for name, file in manifest.files.items()}
        missing = set(self.folder.missing(job.step, manifest))
        for name in share_out(sizes, self._num_ranks)[self._rank]:
            if name in missing:
                self.folder.put(job.step, manifest, job.folder, name, self._go_on)
                self._moved_s = time.monotonic()
        if self._rank == 0:
            self._wait_for_others(job, manifest)
            self.folder.commit(job.step, content)
            self._prune(job, manifest)
        return sum(sizes.values())

    def _wait_for_others(self, job: _Job, manifest: Manifest) -> None:
        """Returns when all files are there.

        Raises:
            CheckpointError: none has come for the deadline, or the checkpoint is no longer there.
        """
        num_missing = len(manifest.files) + 1
        while missing := self.folder.missing(job.step, manifest):
            if len(missing) < num_missing:
                num_missing, self._moved_s = len(missing), time.monotonic()
            if not job.folder.is_dir() or time.monotonic() - self._moved_s > self._deadline_s:
                raise CheckpointError(
                    f"{num_missing} of {len(manifest.files)} files have not come from other ranks, such as "
                    f"{missing[0]}; their warnings are in logs/"
                )
            self._pause(self._poll_s)

    def _prune(self, job: _Job, manifest: Manifest) -> None:
        try:
            self.folder.prune(job.step, manifest, self._keep, self._keep_every)
        except (CheckpointError, WriteError) as error:
            logger.warning("checkpoint.upload: older copies were not deleted, but will be after the next: %s", error)

    def _go_on(self) -> None:
        if self._has_ended.is_set():
            raise _Ended

    def _pause(self, seconds: float) -> None:
        if self._has_ended.wait(seconds):
            raise _Ended
