"""The folder that shards are written to: what is in it, by which settings, and by whom.

- `00000.tar`, `00001.tar`: the shards
- `held_out/00000.tar`: the shards of held-out pictures
- `pack.json`: the settings and the digest of the source; written first
- `classes.txt`: the names of classes in order of their numbers, if the pictures have classes
- `skipped.jsonl`: a line for every picture that was left out
- `report.json`: the counts; written last, so it says that all is there
- `.packing/`: while shards are missing, a record of each that is written, and its held-out pictures
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from bitdance_scale.atomic_files import WRITING, replacing, write_text
from bitdance_scale.data.shard_writing.tar_writer import TarWriter, read_samples
from bitdance_scale.errors import DataError

logger = logging.getLogger(__name__)

SETTINGS, REPORT, SKIPPED, HELD_OUT = "pack.json", "report.json", "skipped.jsonl", "held_out"
_WORK, _LOCK = ".packing", "lock"
_KIND = "bitdance pack 1"


@dataclass
class ShardRecord:
    """What was written of the pictures of one shard.

    Attributes:
        num_packed: samples in the shard.
        num_held_out: samples that were held out of it.
        num_bytes: bytes of all their members.
        captions: what was wrong with captions of these samples -> how often.
        converted: format -> how many pictures were converted from it.
        skipped: name, cause and detail of every picture that was left out.
        without_caption: names of the first pictures that are counted in `captions`.
    """

    num_packed: int = 0
    num_held_out: int = 0
    num_bytes: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, str]] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)


class OutputFolder:
    """A folder that one process at a time writes shards to; use it in a `with` block.

    Args:
        out: the folder; it is made if it is absent.
        settings: everything that the bytes of the shards depend on, name -> value of JSON.
        num_shards: how many shards there will be.

    Raises:
        DataError: the folder holds something else, or was written by other settings, or another process writes to it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], num_shards: int) -> None:
        self.path = out
        self._settings = {"kind": _KIND} | dict(settings)
        self._num_digits = max(5, len(str(num_shards - 1)))
        self._work = out / _WORK

    def __enter__(self) -> OutputFolder:
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is a file; name a folder for the shards")
        self._refuse_others_files()
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = (self._work / _LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise DataError(f"{self.path}: another process packs into this folder; wait for it or stop it") from error
        except OSError as error:
            # A file system without locks: another process cannot be seen.
            logger.warning("%s: cannot be locked (%s); start no other packing into it", self.path, error.strerror)
        try:
            self._check_settings()
            # What a process that was killed has left half-written.
            for left in (*self.path.glob(f"*{WRITING}"), *self._work.glob(f"*{WRITING}")):
                left.unlink()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def shard_name(self, number: int) -> str:
        """The number of a shard in the digits of its name and keys."""
        return f"{number:0{self._num_digits}d}"

    def shard_path(self, number: int) -> Path:
        """The tar of a shard."""
        return self.path / f"{self.shard_name(number)}.tar"

    def held_out_part(self, number: int) -> Path:
        """The tar with the held-out pictures of a shard, until they are joined."""
        return self._work / f"{self.shard_name(number)}.held_out.tar"

    def record(self, number: int) -> ShardRecord | None:
        """What was written of a shard; None if it is not there yet."""
        path = self._record_path(number)
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: Counter(found[name]) for name in ("captions", "converted")}
        return ShardRecord(**found)

    def add_record(self, number: int, record: ShardRecord) -> None:
        """Says that a shard, and the part that is held out of it, are there."""
        write_text(self._record_path(number), json.dumps(vars(record)))

    def report(self) -> dict[str, Any] | None:
        """The report; None if shards are missing."""
        path = self.path / REPORT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def join_held_out(self, num_shards: int, samples_per_shard: int, max_shard_bytes: int) -> dict[str, int]:
        """Joins the parts that are held out to shards; returns shard -> samples."""
        folder = self.path / HELD_OUT
        if folder.exists():
            # An earlier process was stopped while it joined them.
            shutil.rmtree(folder)
        counts: dict[str, int] = {}
        samples = self._held_out_samples(num_shards)
        sample = next(samples, None)
        while sample is not None:
            name = f"{self.shard_name(len(counts))}.tar"
            with TarWriter(folder / name) as writer:
                while sample is not None and writer.num_samples < samples_per_shard:
                    num_bytes = sum(map(len, sample[1].values()))
                    if writer.num_samples and writer.num_bytes + num_bytes > max_shard_bytes:
                        break
                    writer.write(*sample)
                    sample = next(samples, None)
                counts[f"{HELD_OUT}/{name}"] = writer.num_samples
        return counts

    def finish(self, report: Mapping[str, Any], num_shards: int) -> None:
        """Writes what was skipped and the report; after this, the folder is complete."""
        with replacing(self.path / SKIPPED) as writing, writing.open("w", encoding="utf-8") as file:
            for number in range(num_shards):
                record = self.record(number)
                for skipped in record.skipped if record else ():
                    file.write(json.dumps(skipped) + "\n")
        write_text(self.path / REPORT, json.dumps(report, indent=2) + "\n")

    def _held_out_samples(self, num_shards: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in range(num_shards):
            if self.held_out_part(number).is_file():
                yield from read_samples(self.held_out_part(number))

    def _record_path(self, number: int) -> Path:
        return self._work / f"{self.shard_name(number)}.json"

    def _refuse_others_files(self) -> None:
        if not self.path.is_dir() or (self.path / SETTINGS).is_file():
            return
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name != _WORK)
        if others and others != [SETTINGS + WRITING]:
            raise DataError(
                f"{self.path}: holds {others[0]!r} and was not made by this command, so it is left as it is; name a "
                "folder that is new or empty"
            )

    def _leave(self) -> None:
        if self.report() is not None:
            shutil.rmtree(self._work, ignore_errors=True)
        self._lock.close()

    def _is_untouched(self) -> bool:
        """Whether no shard has been written: a call that was refused may be repeated with other options."""
        return self.report() is None and not any(self.path.glob("*.tar")) and not any(self._work.glob("*.*"))

    def _check_settings(self) -> None:
        path = self.path / SETTINGS
        if not path.is_file() or self._is_untouched():
            write_text(path, json.dumps(self._settings, indent=2) + "\n")
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        changes = [
            f"{name} {found.get(name)!r} (now {value!r})"
            for name, value in self._settings.items()
            if found.get(name) != value and name != "source_digest"
        ]
        if not changes and found.get("source_digest") != self._settings.get("source_digest"):
            changes = ["the names, sizes or tables of the source"]
        if changes:
            raise DataError(
                f"{self.path}: was packed from another source or by other settings: {', '.join(changes)}; name another "
                "folder, or repeat the settings of pack.json"
            )
