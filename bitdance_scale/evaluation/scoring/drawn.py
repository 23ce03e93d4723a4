"""A folder that is scored: whose it is, that it is complete, and its images, read as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.evaluation.benchmarks import layout
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark, read_prompts
from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.manifest import DRAWING_NAME, read_drawing
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, prompts_digest
from bitdance_scale.evaluation.distributions.image_sets import FolderImages, NpzImages, open_images
from bitdance_scale.evaluation.image_array import map_npz
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage
from bitdance_scale.evaluation.progress import Progress

_SHOWN_DIGITS = 12


class ScoringStopped(BitDanceError):
    """A stop was asked for before all images were scored."""


def never_stopped() -> bool:
    """What says whether to stop where nothing asks for it."""
    return False


@dataclass(frozen=True)
class Drawn:
    """A complete folder of a drawing, or images of no benchmark.

    Attributes:
        root: the folder, below which scores are written.
        model: name of the model.
        benchmark: whose layout the folder has; None: images of no benchmark.
        record: content of `drawing.json`; empty where another program has drawn.
        prompts: of the benchmark; none without one.
        folder: reads the images of prompts; None without a benchmark.
        images: the images of no benchmark; None with a benchmark.
        size_px: (height, width) of an image.
        is_stopped: whether to stop; asked before every prompt.
    """

    root: Path
    model: str
    benchmark: Benchmark | None
    record: Mapping[str, Any]
    prompts: Sequence[Prompt] = field(repr=False)
    folder: ImageFolder | None
    images: FolderImages | NpzImages | None
    size_px: tuple[int, int]
    is_stopped: Callable[[], bool] = never_stopped

    @property
    def num_images(self) -> int:
        """Images in all."""
        if self.images is not None:
            return self.images.file.number
        return sum(prompt.num_images for prompt in self.prompts)

    def stream(self, what: str, prompts: Sequence[Prompt] | None = None) -> Iterator[tuple[Prompt, list[np.ndarray]]]:
        """Prompts with their images uint8 [H, W, 3], one prompt at a time in memory; progress goes to the log.

        Args:
            what: names the work in the log.
            prompts: some of the drawing's; None for all.

        Raises:
            ConfigError: an image cannot be read.
            ScoringStopped: a stop was asked for.
        """
        assert self.folder is not None
        chosen = self.prompts if prompts is None else prompts
        progress = Progress(sum(prompt.num_images for prompt in chosen), what)
        for prompt in chosen:
            self.refuse_if_stopped()
            yield prompt, self.folder.read(prompt)
            progress.add(prompt.num_images)
            progress.log()

    def batches(self, what: str, batch_size: int) -> Iterator[np.ndarray]:
        """All images as uint8 [n, H, W, 3], without their prompts; progress goes to the log.

        Those of one array come as they lie in it, in rounds: all parts of the Inception Score hold all classes, as in
        published sets, whose order is mixed.

        Args:
            what: names the work in the log.
            batch_size: the largest n.

        Raises:
            BitDanceError: as `stream`.
        """
        if self.images is not None:
            return self.watched(self.images.batches(batch_size), self.num_images, what)
        if self.array is not None:
            return self.watched(_parts(self.array, batch_size), self.num_images, what)
        batches = in_batches(self.stream(what), batch_size)
        return (np.stack([image.pixels for image in batch]) for batch in batches)

    def watched(self, batches: Iterable[np.ndarray], total: int, what: str) -> Iterator[np.ndarray]:
        """The same batches, with progress in the log, until a stop is asked for.

        Args:
            batches: uint8 [n, H, W, 3] each.
            total: images in all of them.
            what: names the work in the log.

        Raises:
            ScoringStopped: a stop was asked for.
        """
        progress = Progress(total, what)
        for batch in batches:
            self.refuse_if_stopped()
            yield batch
            progress.add(len(batch))
            progress.log()

    @property
    def array(self) -> Path | None:
        """The file of the one array that holds all images; None where there is none."""
        if self.benchmark is None:
            return None
        array = self.benchmark.layout(self.model).array
        return None if array is None or not (self.root / array).is_file() else self.root / array

    def refuse_if_stopped(self) -> None:
        """Ends the scoring if a stop was asked for.

        Raises:
            ScoringStopped: it was.
        """
        if self.is_stopped():
            raise ScoringStopped("stopped on request; run again, and what a judge has answered is not asked again")


def _parts(array: Path, batch_size: int) -> Iterator[np.ndarray]:
    every = map_npz(array)
    for start in range(0, len(every), batch_size):
        yield every[start : start + batch_size]


def in_batches(prompts: Iterable[tuple[Prompt, Sequence[np.ndarray]]], batch_size: int) -> Iterator[list[DrawnImage]]:
    """The images of prompts in batches, of which the last one may be smaller."""
    batch: list[DrawnImage] = []
    for prompt, images in prompts:
        for k, image in enumerate(images):
            batch.append(DrawnImage(prompt, k, image))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def open_drawn(
    path: Path,
    prompts: Path | None = None,
    benchmark: str | None = None,
    model: str | None = None,
    is_stopped: Callable[[], bool] = never_stopped,
) -> Drawn:
    """The folder of a drawing, if it is complete; or images of no benchmark, a folder or .npz without `drawing.json`.

    Args:
        path: the folder or file.
        prompts: the benchmark's file of prompts.
        benchmark: name of the benchmark whose layout a folder has that another program has drawn.
        model: its model.
        is_stopped: says whether to stop.

    Raises:
        ConfigError: it is not complete, holds pictures of something else, is of another benchmark or of other prompts.
        DataError: images of no benchmark are damaged or of several kinds.
    """
    if not path.exists():
        raise ConfigError(f"DRAWN {path}: no such folder; draw the images first, with `bitdance evaluate draw`")
    if (path / DRAWING_NAME).is_file():
        return _drawn_here(path, prompts, benchmark, model, is_stopped)
    if benchmark is not None:
        return _drawn_elsewhere(path, prompts, benchmark, model, is_stopped)
    if prompts is not None:
        raise ConfigError(
            f"{path}: holds no drawing ({DRAWING_NAME} is missing), so that {prompts} has no layout to go with; name "
            "--benchmark and --name for a folder that another program has drawn"
        )
    images = open_images(path)
    root = path if path.is_dir() else path.with_suffix("")
    return Drawn(root, model or root.resolve().name, None, {}, (), None, images, images.file.size_px, is_stopped)


def _drawn_here(
    path: Path, prompts: Path | None, benchmark: str | None, model: str | None, is_stopped: Callable[[], bool]
) -> Drawn:
    record = read_drawing(path)
    where = path / DRAWING_NAME
    name = _value(where, record, "benchmark", str)
    drawn_model = _value(where, _value(where, record, "model", dict), "name", str)
    for option, given, there in (("--benchmark", benchmark, name), ("--name", model, drawn_model)):
        if given is not None and given != there:
            raise ConfigError(f"{option} {given}: the drawing in {path} is of {there}; leave the option out")
    version = _value(where, record, "layout_version", int)
    if version != layout.VERSION:
        raise ConfigError(
            f"{where}: has layout_version {version}, and this program reads {layout.VERSION}; score it with the "
            "program that drew it, or draw it again"
        )
    counts = [_value(where, record, key, int) for key in ("images_per_prompt", "num_prompts")]
    found = find_benchmark(name).as_drawn(*counts)
    read = read_prompts(found, prompts)
    digest, drawn_digest = prompts_digest(read), _value(where, record, "prompts_sha256", str)
    if digest != drawn_digest:
        raise ConfigError(
            f"{prompts or name}: holds other prompts than those that were drawn: {len(read)} with the digest "
            f"{digest[:_SHOWN_DIGITS]} here, {counts[1]} with {drawn_digest[:_SHOWN_DIGITS]} in {where}. Name the file "
            "that the drawing was made of"
        )
    size_px = _value(where, record, "size_px", list)
    return _complete(path, found, drawn_model, record, read, (size_px[0], size_px[-1]), is_stopped)


def _drawn_elsewhere(
    path: Path, prompts: Path | None, benchmark: str, model: str | None, is_stopped: Callable[[], bool]
) -> Drawn:
    if not path.is_dir():
        raise ConfigError(f"{path}: is no folder, and the images of {benchmark} lie in one; name it")
    if model is None:
        raise ConfigError(
            f"--name: is missing, and {path} has no {DRAWING_NAME} that says which model drew it; name the model"
        )
    found = find_benchmark(benchmark)
    return _complete(path, found, model, {}, read_prompts(found, prompts), None, is_stopped)


def _complete(
    path: Path,
    benchmark: Benchmark,
    model: str,
    record: Mapping[str, Any],
    prompts: Sequence[Prompt],
    size_px: tuple[int, int] | None,
    is_stopped: Callable[[], bool],
) -> Drawn:
    folder = ImageFolder(path, benchmark.layout(model), prompts, size_px)
    folder.state().require_complete()
    if size_px is None:
        height, width = folder.read(prompts[0])[0].shape[:2]
        size_px = (height, width)
    return Drawn(path, model, benchmark, record, prompts, folder, None, size_px, is_stopped)


def _value(where: Path, record: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = record.get(key)
    if not isinstance(value, kind):
        raise ConfigError(
            f"{where}: {key} = {value!r}, expected {kind.__name__}; restore the file, or draw into a new folder"
        )
    return value
