"""Checkpoints that come back from S3: a run's newest where it has none of its own, and the start of another run.

The ranks share the files out, so that each is fetched once; each is compared with its digest while it is written. All
functions are collectives.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from bitdance_scale.atomic_files import WRITING, commit_folder, write_bytes
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import MANIFEST_NAME, find_damage, read_manifest, share_out
from bitdance_scale.checkpoint.remote_copies import RemoteCopies
from bitdance_scale.checkpoint.remote_folder import RemoteCheckpoint, RemoteFolder, find_start, parse_start
from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR
from bitdance_scale.checkpoint.start_weights import start_files
from bitdance_scale.checkpoint.step_names import START_DIR, STEP_NAME, step_name
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.config.schema import CheckpointSection
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank
from bitdance_scale.wording import file_size

logger = logging.getLogger(__name__)


def find_latest(checkpoints: CheckpointFolder, remote: RemoteCopies | None, *, falls_back: bool = False) -> Path | None:
    """The checkpoint that a run resumes from; fetched from its copies if the run has none of its own.

    A checkpoint that was not copied before the run was stopped is copied now.

    Args:
        checkpoints: the run's own.
        remote: their copies; None: there are none.
        falls_back: whether an older checkpoint of the run's own is taken where the newest is damaged.

    Returns:
        The checkpoint, which is committed in the run's folder; None where there is none, and no copy either.

    Raises:
        CheckpointError: on every rank: the checkpoint or its copy is damaged; or there is no checkpoint and S3 cannot
            be reached: a new run must not begin where an old one may have to go on.
    """
    latest, group = checkpoints.latest(falls_back=falls_back), checkpoints.group
    if remote is None:
        return latest
    if latest is not None:
        if on_first_rank(lambda: _lacks_copy(latest, remote.folder), group, other=CheckpointError):
            remote.upload(latest)
        return latest
    copy = on_first_rank(lambda: _newest(remote.folder, checkpoints.root), group, other=CheckpointError)
    if copy is None:
        return None
    begun_s = time.monotonic()
    with checkpoints.write(copy.step) as aside:
        num_bytes = _fetch(remote.folder, copy, aside, group)
    elapsed_s, source = time.monotonic() - begun_s, remote.folder.where
    root, size = checkpoints.root, file_size(num_bytes)
    logger.info("%s had no checkpoint: step %d came from %s, %s in %.1f s", root, copy.step, source, size, elapsed_s)
    return checkpoints.latest()


def fetch_start(
    where: str,
    section: CheckpointSection,
    run_folder: Path,
    group: dist.ProcessGroup | None = None,
    *,
    weights: str = "trained",
) -> Path:
    """Fetches what a start needs of a copy on S3 into `<run>/start/step_...`; nothing if it is there already.

    That is what `load_start_weights` reads: all small files, and the tensor files that hold float32 masters, or weights
    where there are no masters, or averaged weights.

    Args:
        where: `run.start_from`, on S3.
        section: endpoint and profile.
        run_folder: the run that starts.
        group: its ranks; None: all, or this process alone without a process group.
        weights: `run.start_weights`.

    Returns:
        The folder of the partial checkpoint.

    Raises:
        CheckpointError: on every rank: there is no copy, it is damaged or lacks averaged weights that are asked for, or
            S3 cannot be read.
    """
    with all_ranks(group, other=CheckpointError):
        remote, step = parse_start(where, section)
    copy = on_first_rank(lambda: find_start(remote, step), group, other=CheckpointError)
    into = run_folder / START_DIR / step_name(copy.step)
    aside = into.with_name(into.name + WRITING)
    if on_first_rank(lambda: _is_there(copy, into, aside, weights), group, other=CheckpointError):
        return into
    num_bytes = _fetch(remote, copy, aside, group, start=weights)

    def commit() -> None:
        write_bytes(aside / MANIFEST_NAME, copy.manifest)
        commit_folder(aside, into)

    on_first_rank(commit, group, other=CheckpointError)
    logger.info("fetched the weights of %s, step %d, %s, to %s", remote.where, copy.step, file_size(num_bytes), into)
    return into


def _fetch(
    remote: RemoteFolder, copy: RemoteCheckpoint, into: Path, group: dist.ProcessGroup | None, *, start: str = ""
) -> int:
    """Fetches the files of a copy into a folder that all ranks share; returns their bytes.

    All of them, or what a start from these of its weights needs (`run.start_weights`).
    """
    manifest = read_manifest(copy.manifest, copy.files)
    small = [name for name, file in manifest.files.items() if file.sha256 is not None]
    on_first_rank(lambda: remote.fetch(copy, into, small), group, other=CheckpointError)
    index = on_first_rank(lambda: read_index(into / TENSORS_DIR), group, other=CheckpointError)
    digests = {f"{TENSORS_DIR}/{file.name}": file.sha256 for file in index.files_of("")}
    tensor_files = start_files(copy.files, index, start) if start else manifest.files.keys() - set(small)
    if strange := sorted(tensor_files - (manifest.files.keys() & digests.keys())):
        raise CheckpointError(f"{copy.files}/{strange[0]}: the manifest and the index of the tensors differ on it")
    rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    sizes = {name: manifest.files[name].num_bytes for name in tensor_files}
    with all_ranks(group, other=CheckpointError):
        remote.fetch(copy, into, share_out(sizes, num_ranks)[rank], digests)
    return sum(sizes.values()) + sum(manifest.files[name].num_bytes for name in small)


def _newest(remote: RemoteFolder, root: Path) -> RemoteCheckpoint | None:
    try:
        step = remote.latest()
        return None if step is None else remote.find(step)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. {root} has no checkpoint, and whether {remote.where} has one must be known before a run begins: "
            "mend the access, or set checkpoint.upload='' to start over"
        ) from error


def _lacks_copy(latest: Path, remote: RemoteFolder) -> bool:
    """Whether a run's checkpoint is to be copied; says so if a newer copy than it is there."""
    match = STEP_NAME.fullmatch(latest.name)
    assert match is not None, f"{latest} is no committed checkpoint"
    step = int(match[1])
    try:
        copied = remote.latest()
        if copied is not None and copied > step:
            logger.warning(
                "%s has a copy of step %d; the run goes on from its own checkpoint, of step %d. To take the copy, move "
                "%s away",
                remote.where,
                copied,
                step,
                latest.parent,
            )
            return False
        return copied != step or remote.find(step).manifest != (latest / MANIFEST_NAME).read_bytes()
    except CheckpointError as error:
        logger.warning("%s. The run goes on from its own checkpoint, of step %d", error, step)
        return False


def _is_there(copy: RemoteCheckpoint, into: Path, aside: Path, weights: str) -> bool:
    """Whether the copy was fetched before; otherwise makes room for it."""
    manifest = into / MANIFEST_NAME
    if manifest.is_file() and manifest.read_bytes() == copy.manifest:
        files = start_files(copy.files, read_index(into / TENSORS_DIR), weights)
        if find_damage(into, files) is None:
            return True
    for path in (into, aside):
        if path.exists():
            shutil.rmtree(path)
    aside.mkdir(parents=True)
    return False
