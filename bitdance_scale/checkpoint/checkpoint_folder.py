"""The folder of a run's checkpoints: each is there whole or not at all, whenever the job is killed.

    step_00000100.writing/   being written; never read
    step_00000100/           committed: renamed in one step when all its files are on storage
    step_00000050.deleting/  being deleted; never read
    latest                   name of the checkpoint a run resumes from

The last file written before the rename is a manifest of all files (checkpoint/integrity.py). Damage that happens later,
such as a partial copy, is therefore noticed before anything is loaded.

A file system without room is noticed before anything is written, where it says how much is free. Old checkpoints that
the next commit would delete make way then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from bitdance_scale.atomic_files import WRITING, sync, sync_tree, write_text
from bitdance_scale.checkpoint.integrity import find_damage, listed_bytes, write_manifest
from bitdance_scale.checkpoint.retention import kept_steps
from bitdance_scale.checkpoint.step_names import LATEST_NAME, step_of
from bitdance_scale.checkpoint.step_names import step_name as _name
from bitdance_scale.errors import CheckpointError, DamagedCheckpointError, DiskFullError
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank

_DELETING = ".deleting"

logger = logging.getLogger(__name__)


def _no_hook(action: str) -> None:
    pass


class CheckpointFolder:
    """The checkpoints of one run. Methods are collectives over `group`, whose ranks share the file system.

    Args:
        root: the folder, made at the first checkpoint.
        keep: how many of the newest checkpoints stay after a commit, at least 1.
        keep_every_steps: checkpoints of its multiples are never deleted; 0: none.
        is_busy: whether a checkpoint, by its step, is still being read, so that it is deleted later.
        group: the ranks of the run; None: all, or this process alone without a process group.
        before: called on the first rank before each step of the protocol, with the name of the step; tests kill the
            process there.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every_steps: int = 0,
        is_busy: Callable[[int], bool] = lambda step: False,
        group: dist.ProcessGroup | None = None,
        before: Callable[[str], None] = _no_hook,
    ) -> None:
        assert keep >= 1, "a commit must leave its own checkpoint"
        self.root = Path(root)
        self.group = group
        self._keep, self._keep_every_steps, self._is_busy = keep, keep_every_steps, is_busy
        self._before = before

    @contextlib.contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; committed when the block ends without an error on all ranks.

        Inside the block, an error on some ranks must not leave the other ranks waiting in a collective: steps that can
        fail go through `all_ranks`, `on_first_rank` or `save_sharded`.

        Raises:
            CheckpointError: on every rank, when any rank failed or when a run would resume from a checkpoint of this
                step. Earlier checkpoints and `latest` stay as they were.
        """
        aside = self.root / (_name(step) + WRITING)
        failure = None
        try:
            on_first_rank(lambda: self._create(step, aside), self.group, other=CheckpointError)
            try:
                yield aside
            except Exception as error:  # noqa: BLE001  (any error must reach all ranks; it is raised below)
                failure = error
            with all_ranks(self.group, other=CheckpointError):
                if failure is not None:
                    raise failure
            on_first_rank(lambda: self._commit(aside, self.root / _name(step)), self.group, other=CheckpointError)
        except CheckpointError as error:
            if self._is_first_rank():
                shutil.rmtree(aside, ignore_errors=True)
            raise type(error)(
                f"{self.root}: the checkpoint of step {step} was not committed: {error}. Earlier checkpoints are as "
                "they were"
            ) from (failure or error)
        on_first_rank(lambda: self._point_to(self.root / _name(step)), self.group, other=CheckpointError)
        on_first_rank(lambda: self._prune(step), self.group, other=CheckpointError)

    def latest(self, *, falls_back: bool = False) -> Path | None:
        """The checkpoint to resume from, whose files are all there; None when the run has none.

        It is the one that `latest` names. If only `latest` is missing, it is the newest committed one, with a warning.

        Args:
            falls_back: whether the next older whole checkpoint is taken where this one is damaged.

        Raises:
            CheckpointError: on every rank: a file of the checkpoint is missing or is not what was written. The message
                names the file and says how to resume from an older checkpoint. `load_checkpoint` compares the content
                of tensor files.
        """
        name = on_first_rank(lambda: self._find_latest(falls_back), self.group, other=CheckpointError)
        return None if name is None else self.root / name

    def retreat(self, damaged: Path, damage: str, *, falls_back: bool) -> Path:
        """The next older whole checkpoint, once the files of one were found damaged while they were loaded.

        Args:
            damaged: the checkpoint.
            damage: what is wrong with it.
            falls_back: whether the older one is taken; it is the run's `latest` then.

        Raises:
            DamagedCheckpointError: on every rank: none is to be taken, or there is none.
        """
        action = lambda: self._retreat(damaged.name, damage, falls_back)  # noqa: E731
        return self.root / on_first_rank(action, self.group, other=CheckpointError)

    def make_room(self, step: int) -> bool:
        """Deletes what the commit of `step` would delete; returns whether that was anything."""
        return on_first_rank(lambda: self._make_room(step), self.group, other=CheckpointError)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is once it is committed."""
        return self.root / _name(step)

    def remove_deleted(self) -> None:
        """Removes what a deletion left that was interrupted; on one rank, by the run that the folder belongs to."""
        for path in self.root.glob(f"*{_DELETING}"):
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, in ascending order; no collective."""
        if not self.root.is_dir():
            return []
        return sorted(step for path in self.root.iterdir() if (step := step_of(path.name)) is not None)

    def _create(self, step: int, aside: Path) -> None:
        if (self.root / _name(step)).exists() and self._pointed() in (None, _name(step)):
            raise CheckpointError(f"{_name(step)} exists and a run would resume from it; it is not overwritten")
        self._before("clean")
        if self.root.is_dir():
            for path in self.root.iterdir():
                if path.name.endswith((WRITING, _DELETING)) and path.is_dir():
                    shutil.rmtree(path)
        self._check_room(step)
        self._before("create")
        aside.mkdir(parents=True)

    def _check_room(self, step: int) -> None:
        """Deletes what the commit of `step` would delete if there is no room for another of the size of the newest."""
        steps = self.steps()
        if not steps:
            return
        needed = listed_bytes(self.path_of(steps[-1]))
        if self._free_bytes() < needed:
            self._make_room(step)
        free = self._free_bytes()
        if free < needed:
            raise DiskFullError(
                f"{self.root}: {free / 1e9:.2f} GB are free and a checkpoint has {needed / 1e9:.2f} GB; make room, or "
                "set checkpoint.keep lower"
            )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def _make_room(self, step: int) -> bool:
        steps, pointed = [found for found in self.steps() if found <= step], self._pointed()
        # Beside the one that is to come, which takes the place of an abandoned one of its step; and one in any case.
        kept = kept_steps([found for found in steps if found < step], max(1, self._keep - 1), self._keep_every_steps)
        old = [found for found in steps if found not in kept and _name(found) != pointed and not self._is_busy(found)]
        for found in old:
            logger.warning("%s: deleting %s early to make room", self.root, _name(found))
            self._delete(self.path_of(found))
        return bool(old)

    def _commit(self, aside: Path, committed: Path) -> None:
        self._before("manifest")
        write_manifest(aside)
        sync_tree(aside)
        if committed.exists():
            # Left from training that someone abandoned by going back to an earlier checkpoint.
            self._delete(committed)
        self._before("rename")
        os.rename(aside, committed)
        sync(self.root)

    def _point_to(self, committed: Path) -> None:
        """Names a whole checkpoint in `latest`."""
        self._before("latest")
        latest = self.root / LATEST_NAME
        try:
            write_text(latest, committed.name + "\n")
        except OSError as error:
            pointed = self._pointed()
            would = f"a run would resume from {pointed}" if pointed else "a run resumes from the newest checkpoint"
            raise CheckpointError(
                f"{latest}: cannot be written ({error}); {committed} is whole, but {would}. Make room, and write "
                f"{committed.name} into {latest}"
            ) from error

    def _prune(self, step: int) -> None:
        """Deletes old checkpoints. Later steps, left from abandoned training, stay and do not count."""
        steps = [found for found in self.steps() if found <= step]
        kept = kept_steps(steps, self._keep, self._keep_every_steps)
        for old in steps:
            if old not in kept and not self._is_busy(old):
                self._delete(self.path_of(old))

    def _delete(self, path: Path) -> None:
        """Renames a checkpoint, so that it is never read half deleted, and deletes it."""
        aside = path.with_name(path.name + _DELETING)
        self._before("delete_rename")
        os.rename(path, aside)
        sync(self.root)
        self._before("delete")
        shutil.rmtree(aside)

    def _pointed(self) -> str | None:
        try:
            return (self.root / LATEST_NAME).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.root / LATEST_NAME} cannot be read ({type(error).__name__}: {error}); write the name of a "
                "checkpoint into it, such as step_00000100"
            ) from error

    def _find_latest(self, falls_back: bool) -> str | None:
        name, steps = self._pointed(), self.steps()
        newest = _name(steps[-1]) if steps else None
        if name is None:
            if newest is not None:
                logger.warning("%s: no file %r; taking the newest checkpoint, %s", self.root, LATEST_NAME, newest)
            name = newest
        elif newest is not None and name != newest:
            logger.warning("%s: %r names %s; the newest checkpoint is %s", self.root, LATEST_NAME, name, newest)
        if name is None:
            return None
        problem = find_damage(self.root / name) if step_of(name) is not None else "not the name of a checkpoint"
        return name if problem is None else self._retreat(name, problem, falls_back)

    def _retreat(self, damaged: str, damage: str, falls_back: bool) -> str:
        """The name of the checkpoint to take in place of a damaged one: the next older whole one, or else any."""
        bound = step_of(damaged)
        others = [step for step in reversed(self.steps()) if _name(step) != damaged]
        older = [step for step in others if bound is None or step < bound]
        whole = (step for step in [*older, *others] if find_damage(self.path_of(step)) is None)
        step = next(whole, None)
        where = f"{self.root / damaged}: {damage}"
        if step is None:
            raise DamagedCheckpointError(
                f"{where}; no other checkpoint is whole: restore this one, or remove {self.root} to start again"
            )
        if not falls_back:
            raise DamagedCheckpointError(
                f"{where}; {_name(step)} is whole: to resume from it, set checkpoint.fall_back=true or write "
                f"{_name(step)} into {self.root / LATEST_NAME}"
            )
        logger.error("%s; FALLING BACK to step %d: the steps after it are trained again", where, step)
        write_text(self.root / LATEST_NAME, _name(step) + "\n")
        return _name(step)

    def _is_first_rank(self) -> bool:
        return not dist.is_initialized() or dist.get_rank(self.group) == 0
