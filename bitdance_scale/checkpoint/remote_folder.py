"""The copies of a run's checkpoints on S3: each counts whole or not at all, whenever a job is killed.

    PREFIX/step_00000100/manifest.json        the marker: the manifest of the checkpoint, written last and at once
    PREFIX/step_00000100/<digest>/...         its files as in its folder, under the digest that the manifest has of them
    PREFIX/latest                             name of the copy that a run goes on from

A copy without its marker is never read. As the files lie under the digest of their list, what a killed copy has left is
either taken over by the next one, or is of no use to it and in nobody's way: files of two checkpoints of one step never
mix. A checkpoint that was put there by hand, its files beside its manifest, is read as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.atomic_files import sync
from bitdance_scale.checkpoint.integrity import MANIFEST_NAME, Manifest, ManifestError, read_manifest
from bitdance_scale.checkpoint.retention import kept_steps
from bitdance_scale.checkpoint.step_names import LATEST_NAME, STEP_NAME, step_name
from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.config.schema import S3_SCHEME, CheckpointSection
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.errors import CheckpointError, DataError
from bitdance_scale.wording import first_few

if TYPE_CHECKING:
    from bitdance_scale.data.storage.s3_files import S3Files

REQUEST_DEADLINE_S = 60.0
"""How long a request is repeated before it counts as failed."""
_DIGEST_CHARACTERS = 12


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A copy whose marker is there.

    Attributes:
        step: of the checkpoint.
        manifest: its content, as bytes of the marker.
        files: prefix of its files.
    """

    step: int
    manifest: bytes
    files: str


class RemoteFolder:
    """The copies under one prefix; no method is a collective.

    Args:
        where: `s3://BUCKET/PREFIX`, the copies of one run.
        files: reads and writes objects.
        setting: the setting that names the prefix, for messages.
    """

    def __init__(self, where: str, files: S3Files, setting: str = "checkpoint.upload") -> None:
        self.where = where.rstrip("/")
        self._files = files
        self._setting = setting

    def steps(self) -> list[int]:
        """Steps whose markers are there, in ascending order.

        Raises:
            CheckpointError: the prefix cannot be listed.
        """
        return _committed(self._listed())

    def latest(self) -> int | None:
        """The step that a run goes on from; None if there is no copy.

        It is the one that `latest` names, or the newest where `latest` is missing.

        Raises:
            CheckpointError: the prefix cannot be read, or `latest` names a copy that is not there.
        """
        names = self._listed()
        steps = _committed(names)
        if LATEST_NAME not in names:
            return steps[-1] if steps else None
        with self._reading():
            content = self._files.read(f"{self.where}/{LATEST_NAME}", names[LATEST_NAME])
        name = content.decode("utf-8", "replace").strip()
        match = STEP_NAME.fullmatch(name)
        if match is None or int(match[1]) not in steps:
            there = ", ".join(map(step_name, steps)) or "none"
            raise CheckpointError(
                f"{self.where}/{LATEST_NAME}: names {name!r}, which is no copy there ({there}); write the name of one "
                "into it"
            )
        return int(match[1])

    def runs_below(self) -> list[str]:
        """Prefixes below this one that have copies, sorted.

        Raises:
            CheckpointError: the prefix cannot be listed.
        """
        above = {name.rpartition("/step_")[0] for name in self._listed() if name.endswith(f"/{MANIFEST_NAME}")}
        return sorted(f"{self.where}/{run}" for run in above if run and STEP_NAME.fullmatch(run) is None)

    def find(self, step: int) -> RemoteCheckpoint:
        """The copy of a step.

        Raises:
            CheckpointError: its marker is not there or is damaged, or it cannot be read.
        """
        prefix = f"{self.where}/{step_name(step)}"
        names = self._listed(step_name(step))
        if MANIFEST_NAME not in names:
            steps = ", ".join(map(step_name, self.steps())) or "none"
            raise CheckpointError(f"{prefix}: no copy of a checkpoint is there (copies: {steps}); name one of them")
        with self._reading():
            content = self._files.read(f"{prefix}/{MANIFEST_NAME}", names[MANIFEST_NAME])
            digest = read_manifest(content, f"{prefix}/{MANIFEST_NAME}").sha256[:_DIGEST_CHARACTERS]
        is_by_hand = not any(name.startswith(f"{digest}/") for name in names)
        return RemoteCheckpoint(step, content, prefix if is_by_hand else f"{prefix}/{digest}")

    def fetch(
        self, copy: RemoteCheckpoint, into: Path, names: Iterable[str], digests: Mapping[str, str] | None = None
    ) -> None:
        """Writes files of a copy into a folder and forces them to storage; each is compared while it is written.

        Args:
            copy: the copy.
            into: the folder.
            names: paths of the files in the checkpoint.
            digests: path -> SHA-256 of files whose digest the manifest does not have.

        Raises:
            CheckpointError: a file is missing, damaged or of another size; names it.
            OSError: of the file system.
        """
        manifest = read_manifest(copy.manifest, copy.files)
        for name in names:
            state, path = manifest.files[name], f"{copy.files}/{name}"
            try:
                found = self._files.read_file(path, into / name, state.num_bytes)
            except ReadError as error:
                raise CheckpointError(f"{self._setting}: {error}; {self._way_out(copy.step)}") from error
            if found != (state.sha256 or (digests or {})[name]):
                raise CheckpointError(
                    f"{path} is damaged: its SHA-256 is not that of what was written; {self._way_out(copy.step)}"
                )
            sync(into / name)

    def missing(self, step: int, manifest: Manifest) -> list[str]:
        """The files of a checkpoint that are not yet there, or not with their size.

        Raises:
            CheckpointError: the prefix cannot be listed.
        """
        found = self._listed(f"{step_name(step)}/{manifest.sha256[:_DIGEST_CHARACTERS]}")
        return [name for name, file in manifest.files.items() if found.get(name) != file.num_bytes]

    def put(self, step: int, manifest: Manifest, folder: Path, name: str, goes_on: Callable[[], None]) -> None:
        """Copies a file of a checkpoint; the marker is `commit`'s.

        Args:
            step: of the checkpoint.
            manifest: what it holds.
            folder: where it is.
            name: path of the file in it.
            goes_on: called before every part; an error that it raises ends the copying.

        Raises:
            WriteError: the object cannot be written.
            OSError: of the file system, such as a file that was deleted.
        """
        prefix = f"{self.where}/{step_name(step)}/{manifest.sha256[:_DIGEST_CHARACTERS]}"
        self._files.write_file(f"{prefix}/{name}", folder / name, goes_on)

    def commit(self, step: int, manifest: bytes) -> None:
        """Makes a copy count, whose files are all there: writes the manifest beside them, the marker, and `latest`.

        Raises:
            WriteError: an object cannot be written.
            ManifestError: the manifest is damaged.
        """
        prefix = f"{self.where}/{step_name(step)}"
        digest = read_manifest(manifest, MANIFEST_NAME).sha256[:_DIGEST_CHARACTERS]
        self._files.write(f"{prefix}/{digest}/{MANIFEST_NAME}", manifest)
        self._files.write(f"{prefix}/{MANIFEST_NAME}", manifest)
        self._files.write(f"{self.where}/{LATEST_NAME}", f"{step_name(step)}\n".encode())

    def prune(self, step: int, manifest: Manifest, keep: int, every: int) -> None:
        """Deletes what does not stay after the copy of a step: older copies, and what killed ones have left.

        A marker is deleted before its files. Copies of later steps, left from abandoned training, stay and do not
        count.

        Args:
            step: the copy just made.
            manifest: of it.
            keep: how many of the newest stay; 0: all.
            every: steps that are a multiple of it stay for ever; 0: none does.

        Raises:
            CheckpointError, WriteError: objects cannot be listed or deleted.
        """
        names = self._listed()
        steps = [found for found in _committed(names) if found <= step]
        stay = kept_steps(steps, keep or len(steps), every)
        own = (f"{step_name(step)}/{manifest.sha256[:_DIGEST_CHARACTERS]}/", f"{step_name(step)}/{MANIFEST_NAME}")
        old = [
            name
            for name in names
            if (match := STEP_NAME.fullmatch(name.partition("/")[0]))
            and int(match[1]) <= step
            and (int(match[1]) not in stay if int(match[1]) < step else not name.startswith(own))
        ]
        markers = [name for name in old if name.count("/") == 1 and name.endswith(f"/{MANIFEST_NAME}")]
        for group in (markers, [name for name in old if name not in set(markers)]):
            self._files.delete(f"{self.where}/{name}" for name in group)

    def _listed(self, below: str = "") -> dict[str, int]:
        """Path below the prefix, or below a part of it -> size."""
        prefix = f"{self.where}/{below}/" if below else f"{self.where}/"
        with self._reading():
            return {path.removeprefix(prefix): state.num_bytes for path, state in self._files.listed(prefix).items()}

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raises errors of storage and of manifests as ours, with the setting that leads there."""
        try:
            yield
        except (ReadError, DataError, ManifestError) as error:
            raise CheckpointError(f"{self._setting}: {error}") from error

    def _way_out(self, damaged: int) -> str:
        with contextlib.suppress(CheckpointError):
            others = [step for step in self.steps() if step != damaged]
            if others:
                return f"to take step {others[-1]}, write {step_name(others[-1])} into {self.where}/{LATEST_NAME}"
        return "there is no other copy"


def open_remote(
    where: str,
    section: CheckpointSection,
    *,
    setting: str = "checkpoint.upload",
    num_ranks: int = 1,
    pause: Callable[[float], None] | None = None,
) -> RemoteFolder:
    """The copies under a prefix.

    Args:
        where: `s3://BUCKET/PREFIX`.
        section: endpoint, profile and rate.
        setting: the setting that names the prefix, for messages.
        num_ranks: ranks that send at once and share the rate.
        pause: sleeps for so many seconds; None: as `time.sleep`.

    Raises:
        DataError: the section does not give a client for S3.
    """
    # boto3 takes a second to import, which runs without copies do not need.
    from bitdance_scale.data.storage.s3_client import SettingNames
    from bitdance_scale.data.storage.s3_files import S3Files

    names = SettingNames(
        endpoint_url="checkpoint.upload_endpoint_url",
        profile="checkpoint.upload_profile",
        denied="set AWS_PROFILE or checkpoint.upload_profile, or give the role of the instance access",
        path=setting,
        deadline="the deadline of a request",
    )
    access = S3Section(
        endpoint_url=section.upload_endpoint_url, profile=section.upload_profile, deadline_s=REQUEST_DEADLINE_S
    )
    rate = section.upload_mb_per_s * 2**20 / num_ranks
    files = S3Files(access, names, bytes_per_s=rate, **({} if pause is None else {"pause": pause}))
    return RemoteFolder(where, files, setting)


def parse_start(where: str, section: CheckpointSection) -> tuple[RemoteFolder, int | None]:
    """The copies that `run.start_from` names on S3, and the step that it names; None: their latest.

    Args:
        where: `s3://BUCKET/PREFIX/NAME`, the copies of a run, or one of them (`.../step_00000100`).
        section: endpoint and profile.

    Raises:
        DataError: the section does not give a client for S3.
    """
    above, _, name = where.rstrip("/").rpartition("/")
    match = STEP_NAME.fullmatch(name)
    remote = open_remote(above if match else where, section, setting="run.start_from")
    return remote, int(match[1]) if match else None


def find_start(remote: RemoteFolder, step: int | None) -> RemoteCheckpoint:
    """The copy to start from, as `parse_start` has read it.

    Raises:
        CheckpointError: there is none, or S3 cannot be read.
    """
    step = remote.latest() if step is None else step
    if step is None:
        raise CheckpointError(f"run.start_from = {remote.where!r}: no copy of a checkpoint is there; {_nearby(remote)}")
    return remote.find(step)


def _nearby(remote: RemoteFolder) -> str:
    """Where copies are, below a prefix that has none itself."""
    runs = remote.runs_below()
    if runs:
        return f"name a run below it: {first_few(runs)}"
    return (
        "name the copies of a run, <checkpoint.upload>/<run.name>, which have a manifest.json in each step_.../ "
        f"(see them with `aws s3 ls --recursive {remote.where}/`)"
    )


def is_remote(path: str) -> bool:
    """Whether a path is on S3."""
    return path.startswith(S3_SCHEME)


def _committed(names: Collection[str]) -> list[int]:
    """Steps whose markers are among the names."""
    folders = (name.removesuffix(f"/{MANIFEST_NAME}") for name in names if name.endswith(f"/{MANIFEST_NAME}"))
    return sorted(int(match[1]) for folder in folders if (match := STEP_NAME.fullmatch(folder)))
