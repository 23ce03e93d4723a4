"""Packs a source of pictures into shards: in threads, resumable, and the same bytes whatever happens in between."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.class_map import CLASSES_FILE
from bitdance_scale.data.data_errors import ErrorCause
from bitdance_scale.data.shard_writing.classes import PicturesOfClasses
from bitdance_scale.data.shard_writing.open_source import open_source
from bitdance_scale.data.shard_writing.output_folder import OutputFolder, ShardRecord
from bitdance_scale.data.shard_writing.picture_check import CheckedPicture, check_picture
from bitdance_scale.data.shard_writing.source import PictureSource, SkippedPicture, SourcePicture
from bitdance_scale.data.shard_writing.tar_writer import BYTES_PER_SAMPLE, TarWriter, record_bytes
from bitdance_scale.errors import DataError
from bitdance_scale.wording import file_size

NUM_NAMED = 5
"""So many pictures without a caption are named."""
MISSING_CAPTION_POLICIES = ("keep", "skip", "error")
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackOptions:
    """What the bytes of the shards depend on, besides the source.

    Attributes:
        samples_per_shard: pictures of the source in a shard, before any is skipped or held out.
        max_shard_bytes: bytes of these pictures, unless a single one is larger.
        held_out: share of the pictures that go to the held-out shards, 0 <= share < 1.
        missing_caption: what happens to a picture without a usable caption.
        check: whether every picture is decoded.
        caption: column of the captions; empty: by its name.
        image: column of the pictures or of their file names; empty: by its type or name.
    """

    samples_per_shard: int = 5000
    max_shard_bytes: int = 1_000_000_000
    held_out: float = 0.0
    missing_caption: str = "keep"
    check: bool = True
    caption: str = ""
    image: str = ""


def pack_source(
    source_path: str | Path,
    out: str | Path,
    options: PackOptions = PackOptions(),
    *,
    has_classes: bool = False,
    class_map: Path | None = None,
    num_workers: int = 1,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Writes the shards of a source that are not there yet; returns the report (see `_report`).

    Args:
        source_path: what `open_source` takes.
        out: folder of the shards, new or of an earlier call with the same source and options.
        options: what the result depends on.
        has_classes: as of `open_source`; where there are classes, their names are written beside the shards.
        class_map: as of `open_source`.
        num_workers: threads; each has one picture in memory (of Parquet, a few rows).
        progress: called with the pictures that are done and those there are in all, from any thread, one at a time.

    Raises:
        DataError: the source or the folder cannot be used, there is no room, a caption is missing although
            `missing_caption` is "error", a class is wrong, or not one picture can be packed.
        OSError: of the file system, where it may pass; the same call goes on from there.
    """
    out = Path(out)
    _refuse_overlap(Path(source_path), out)
    source = open_source(source_path, options.caption, options.image, has_classes=has_classes, class_map=class_map)
    if options.missing_caption == "error":
        _refuse_missing_captions(list(source.without_caption()), len(source.num_bytes))
    shards = cut_shards(source.num_bytes, options.samples_per_shard, options.max_shard_bytes)
    settings = {"source": source.kind, "num_pictures": len(source.num_bytes), "source_digest": source.digest}
    with OutputFolder(out, settings | asdict(options), len(shards)) as folder:
        report = folder.report()
        if report is not None:
            return report
        if isinstance(source, PicturesOfClasses):
            write_text(out / CLASSES_FILE, source.classes.text())
        packing = _Packing(source, folder, options, shards, progress)
        packing.run(num_workers)
        return packing.finish()


def cut_shards(num_bytes: np.ndarray, samples_per_shard: int, max_shard_bytes: int) -> list[tuple[int, int]]:
    """(first, end) of the pictures of every shard.

    Args:
        num_bytes: int64 [n], size of every picture.
        samples_per_shard: most pictures of a shard.
        max_shard_bytes: most bytes of its pictures; a picture that is larger has a shard of its own.
    """
    ends = np.cumsum(num_bytes)
    shards, start, before = [], 0, 0
    while start < len(num_bytes):
        fits = int(np.searchsorted(ends, before + max_shard_bytes, "right"))
        stop = min(max(fits, start + 1), start + samples_per_shard)
        shards.append((start, stop))
        start, before = stop, int(ends[stop - 1])
    return shards


class _Packing:
    """One run over the shards of a source."""

    def __init__(
        self,
        source: PictureSource,
        folder: OutputFolder,
        options: PackOptions,
        shards: Sequence[tuple[int, int]],
        progress: _Progress | None,
    ) -> None:
        self._source, self._folder, self._options, self._shards = source, folder, options, shards
        self._progress = progress
        self._num_done = 0
        self._progress_lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._key_digits = max(4, len(str(options.samples_per_shard - 1)))

    def run(self, num_workers: int) -> None:
        """Writes the shards that are missing."""
        missing = {number for number in range(len(self._shards)) if self._folder.record(number) is None}
        self._check_room(missing)
        self._advance(sum(stop - start for n, (start, stop) in enumerate(self._shards) if n not in missing))
        runs = [run for run in self._runs() if missing & set(run)]
        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(self._write_run, run, missing) for run in runs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # After an error, or Ctrl-C, the threads stop after the picture that they are at.
                if not all(future.done() for future in futures):
                    self._is_stopped.set()
                    pool.shutdown(cancel_futures=True)
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, _Stopped)):
            raise error

    def finish(self) -> dict[str, Any]:
        """Joins what is held out and writes the report."""
        records = [self._folder.record(number) for number in range(len(self._shards))]
        done = [record for record in records if record is not None]
        assert len(done) == len(self._shards)
        skipped = Counter(entry["cause"] for record in done for entry in record.skipped)
        if not any(record.num_packed for record in done):
            causes = ", ".join(f"{cause} {count}" for cause, count in skipped.items())
            raise DataError(
                f"{self._folder.path}: not one of {len(self._source.num_bytes)} pictures could be packed "
                f"({causes or 'all are held out'}); correct the source or the options, and remove this folder"
            )
        options = self._options
        held_out = self._folder.join_held_out(len(done), options.samples_per_shard, options.max_shard_bytes)
        report = {
            "num_pictures": len(self._source.num_bytes),
            "num_packed": sum(record.num_packed for record in done),
            "num_held_out": sum(record.num_held_out for record in done),
            "num_bytes": sum(record.num_bytes for record in done),
            "skipped": dict(skipped.most_common()),
            "captions": dict(sum((record.captions for record in done), Counter())),
            "without_caption": [name for record in done for name in record.without_caption][:NUM_NAMED],
            "converted": dict(sum((record.converted for record in done), Counter())),
            "left_out": self._source.left_out,
            "shards": {
                self._folder.shard_path(number).name: record.num_packed
                for number, record in enumerate(done)
                if record.num_packed
            },
            "held_out_shards": held_out,
        }
        if isinstance(self._source, PicturesOfClasses):
            report |= {"num_classes": len(self._source.classes.names), "num_empty_classes": self._source.num_empty}
        self._folder.finish(report, len(done))
        return report

    def _runs(self) -> Iterator[list[int]]:
        """Shards that are read one after the other, because the source cannot be entered in between."""
        run: list[int] = []
        for number, (start, _) in enumerate(self._shards):
            if run and self._source.can_start_at(start):
                yield run
                run = []
            run.append(number)
        if run:
            yield run

    def _write_run(self, run: Sequence[int], missing: set[int]) -> None:
        wanted = [number for number in run if number in missing]
        first, last = wanted[0], wanted[-1]
        pictures = self._source.pictures(self._shards[first][0], self._shards[last][1])
        for number in range(first, last + 1):
            start, stop = self._shards[number]
            if number in missing:
                self._write_shard(number, pictures, stop - start)
            else:
                for _ in range(stop - start):
                    next(pictures)
            if self._is_stopped.is_set():
                return

    def _write_shard(self, number: int, pictures: Iterator[SourcePicture], count: int) -> None:
        record = ShardRecord()
        with (
            TarWriter(self._folder.held_out_part(number)) as held_out,
            TarWriter(self._folder.shard_path(number)) as packed,
        ):
            for place in range(count):
                if self._is_stopped.is_set():
                    raise _Stopped
                picture = next(pictures)
                key = f"{self._folder.shard_name(number)}{place:0{self._key_digits}d}"
                try:
                    checked = self._checked(picture)
                    members = self._members(key, picture, checked)
                except SkippedPicture as error:
                    record.skipped.append({"name": picture.name, "cause": error.cause, "detail": error.detail})
                else:
                    # A picture with a class needs no caption.
                    is_expected = picture.label is None or picture.caption.problem is not ErrorCause.MISSING_CAPTION
                    if picture.caption.problem is not None and is_expected:
                        record.captions[str(picture.caption.problem)] += 1
                        if len(record.without_caption) < NUM_NAMED:
                            record.without_caption.append(picture.name)
                    if checked.converted_from:
                        record.converted[checked.converted_from] += 1
                    writer = held_out if is_held_out(checked.sha256, self._options.held_out) else packed
                    writer.write(key, members)
                self._advance(1)
        record.num_packed, record.num_held_out = packed.num_samples, held_out.num_samples
        record.num_bytes = packed.num_bytes + held_out.num_bytes
        self._folder.add_record(number, record)

    def _checked(self, picture: SourcePicture) -> CheckedPicture:
        if isinstance(picture.content, SkippedPicture):
            raise picture.content
        problem = picture.caption.problem
        if problem is not None and self._options.missing_caption == "error":
            _refuse_caption(picture.name, problem)
        if problem is not None and self._options.missing_caption == "skip":
            raise SkippedPicture(problem, "--missing-caption skip")
        return check_picture(picture.content, is_decoded=self._options.check)

    @staticmethod
    def _members(key: str, picture: SourcePicture, checked: CheckedPicture) -> dict[str, bytes]:
        """Members of a sample as img2dataset orders them, with a record as it has it."""
        height, width = checked.size_px
        caption = picture.caption
        record = picture.columns | {
            "caption": caption.text if caption.problem is None else None,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": width,
            "height": height,
            "original_width": width,
            "original_height": height,
            "original_name": picture.name,
            "sha256": checked.sha256,
        }
        if checked.converted_from:
            record["converted_from"] = checked.converted_from
        members = {checked.extension: checked.content, "json": record_bytes(record)}
        if picture.label is not None:
            members["cls"] = str(picture.label).encode()
        if caption.problem in (None, ErrorCause.EMPTY_CAPTION):
            members["txt"] = caption.text.encode()
        return members

    def _advance(self, count: int) -> None:
        with self._progress_lock:
            self._num_done += count
            if self._progress is not None:
                self._progress(self._num_done, len(self._source.num_bytes))

    def _check_room(self, missing: set[int]) -> None:
        spans = [self._shards[number] for number in missing]
        needed = sum(
            int(self._source.num_bytes[start:stop].sum()) + (stop - start) * BYTES_PER_SAMPLE for start, stop in spans
        )
        free = shutil.disk_usage(self._folder.path).free
        if needed > free:
            raise DataError(
                f"{self._folder.path}: the shards need about {file_size(needed)}, {file_size(free)} are free; make "
                "room, or name a folder on another disk"
            )


class _Stopped(Exception):
    """Another thread has failed, so this shard is given up."""


def is_held_out(sha256: str, share: float) -> bool:
    """Whether a picture is held out: by its bytes alone, so equal pictures are on the same side in every source."""
    return int(sha256[:16], 16) < share * 2**64


def _refuse_missing_captions(names: Sequence[str], num_pictures: int) -> None:
    if names:
        more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
        raise DataError(
            f"no caption for {len(names)} of {num_pictures} pictures, {', '.join(names[:NUM_NAMED])}{more}, and "
            "--missing-caption error asks for one of every picture; write them (NAME.txt beside NAME.png, or in the "
            "table), or choose keep or skip"
        )


def _refuse_caption(name: str, problem: ErrorCause) -> None:
    raise DataError(
        f"{name}: {problem}, and --missing-caption error asks for a caption of every picture; write one, or choose "
        "keep or skip"
    )


def _refuse_overlap(source: Path, out: Path) -> None:
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out}: lies in the source {source}; name a folder outside, so that the source stays as it is")
