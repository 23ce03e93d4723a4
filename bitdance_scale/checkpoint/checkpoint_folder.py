"""The folder of a run's checkpoints: each is there whole or not at all, whenever the job is killed.

    step_00000100.writing/   being written; never read
    step_00000100/           committed: renamed in one step when all its files are on storage
    step_00000050.deleting/  being deleted; never read
    latest                   name of the checkpoint a run resumes from

The last file written before the rename is a manifest of all files (checkpoint/integrity.py). Damage that happens later,
such as a partial copy, is therefore noticed before anything is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from bitdance_scale.atomic_files import WRITING, sync, sync_tree, write_text
from bitdance_scale.checkpoint.integrity import find_damage, write_manifest
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank

LATEST_NAME = "latest"
_DELETING = ".deleting"
_COMMITTED = re.compile(r"step_(\d{8,})")

logger = logging.getLogger(__name__)


def _no_hook(action: str) -> None:
    pass


class CheckpointFolder:
    """The checkpoints of one run. Methods are collectives over `group`, whose ranks share the file system.

    Args:
        root: the folder, made at the first checkpoint.
        keep: how many of the newest checkpoints stay after a commit, at least 1.
        group: the ranks of the run; None: all, or this process alone without a process group.
        before: called on the first rank before each step of the protocol, with the name of the step; tests kill the
            process there.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        group: dist.ProcessGroup | None = None,
        before: Callable[[str], None] = _no_hook,
    ) -> None:
        assert keep >= 1, "a commit must leave its own checkpoint"
        self.root = Path(root)
        self.group = group
        self._keep = keep
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
            raise CheckpointError(
                f"{self.root}: the checkpoint of step {step} was not committed: {error}. Earlier checkpoints are as "
                "they were"
            ) from (failure or error)
        on_first_rank(lambda: self._point_to(self.root / _name(step)), self.group, other=CheckpointError)
        on_first_rank(lambda: self._prune(step), self.group, other=CheckpointError)

    def latest(self) -> Path | None:
        """The checkpoint to resume from, whose files are all there; None when the run has none.

        It is the one that `latest` names. If only `latest` is missing, it is the newest committed one, with a warning.

        Raises:
            CheckpointError: on every rank: a file of the checkpoint is missing or is not what was written. The message
                names the file and says how to resume from an older checkpoint. `load_checkpoint` compares the content
                of tensor files.
        """
        name = on_first_rank(self._find_latest, self.group, other=CheckpointError)
        return None if name is None else self.root / name

    def remove_deleted(self) -> None:
        """Removes what a deletion left that was interrupted; on one rank, by the run that the folder belongs to."""
        for path in self.root.glob(f"*{_DELETING}"):
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, in ascending order; no collective."""
        if not self.root.is_dir():
            return []
        return sorted(int(match[1]) for path in self.root.iterdir() if (match := _COMMITTED.fullmatch(path.name)))

    def _create(self, step: int, aside: Path) -> None:
        if (self.root / _name(step)).exists() and self._pointed() in (None, _name(step)):
            raise CheckpointError(f"{_name(step)} exists and a run would resume from it; it is not overwritten")
        self._before("clean")
        if self.root.is_dir():
            for path in self.root.iterdir():
                if path.name.endswith((WRITING, _DELETING)) and path.is_dir():
                    shutil.rmtree(path)
        self._before("create")
        aside.mkdir(parents=True)

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
        for old in [s for s in self.steps() if s <= step][: -self._keep]:
            self._delete(self.root / _name(old))

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

    def _find_latest(self) -> str | None:
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
        problem = find_damage(self.root / name) if _COMMITTED.fullmatch(name) else "not the name of a checkpoint"
        if problem is not None:
            raise CheckpointError(f"{self.root / name}: {problem}; {self._way_out(name)}")
        return name

    def _way_out(self, damaged: str) -> str:
        for step in reversed(self.steps()):
            if _name(step) != damaged and find_damage(self.root / _name(step)) is None:
                return f"to resume from step {step}, write {_name(step)} into {self.root / LATEST_NAME}"
        return f"no other checkpoint is whole: restore this one, or remove {self.root} to start again"

    def _is_first_rank(self) -> bool:
        return not dist.is_initialized() or dist.get_rank(self.group) == 0


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for any other name."""
    match = _COMMITTED.fullmatch(name)
    return None if match is None else int(match[1])


def _name(step: int) -> str:
    return f"step_{step:08d}"
