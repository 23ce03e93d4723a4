"""Draws images of all classes with a trained network, shared out over the ranks of a job, for an evaluation suite.

Image n is of class n // per_class and draws from noise stream n of `sample.seed`, so it is the same under every layout
and in every batch, up to rounding. Batches are written as they are drawn, and a job that was stopped goes on with those
that are missing. At the end they become one `samples.npz` with `arr_0`, uint8 [N, H, W, 3], as ADM's evaluation suite
reads it; it is streamed, a batch in memory at a time.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitdance_scale.atomic_files import replacing, write_text
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.class_map import ClassLabels
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.image_array import write_npz
from bitdance_scale.generate.out_of_memory import refused_batch_size
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.parallel.agreement import all_ranks, any_rank, on_first_rank
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.sampling import BatchDrawer, sample_grid
from bitdance_scale.train.still_run import load_still_run

logger = logging.getLogger(__name__)

SAMPLES_NAME, RECORD_NAME, GRID_NAME = "samples.npz", "draw.json", "grid.png"
PARTS_DIR, IMAGES_DIR = "parts", "images"
MAX_GRID_IMAGES, GRID_COLUMNS = 64, 8
_WAIT_S = 14 * 24 * 3600.0


@dataclass(frozen=True)
class Drawing:
    """What is drawn.

    Attributes:
        out: folder.
        where: the weights: a checkpoint, a run folder or an import.
        per_class: images of every class.
        batch_size: images that a replica draws together.
        has_pictures: whether every image is written as a PNG too.
    """

    out: Path
    where: str
    per_class: int
    batch_size: int
    has_pictures: bool


class Drawer:
    """Draws batches of images on this rank's replica.

    Args:
        config: the run, checked; class-conditional.
        drawing: what is drawn.
        checkpoint: where the weights are.
        topology: the ranks.

    Raises:
        BitDanceError: on all ranks: the checkpoint does not fit, or has not the weights that are to draw.
    """

    def __init__(self, config: RunConfig, drawing: Drawing, checkpoint: Path, topology: Topology) -> None:
        self._config, self._drawing, self._topology = config, drawing, topology
        self._run = load_still_run(config, checkpoint, config.sample.weights, topology)
        self._drawer = BatchDrawer(self._run.model, config, self._run.condition, topology)

    def draw(self, numbers: range) -> np.ndarray | None:
        """Images by number: uint8 [N, H, W, 3] on the first rank of the replica, None on its others."""
        condition = self._run.condition
        prompts = [condition.prompt_ids(str(number // self._drawing.per_class)) for number in numbers]
        bits = self._drawer.draw(prompts, numbers)
        if not self._topology.is_reader:
            return None
        return np.stack([self._run.vision.decode(rows, sample_grid(self._config)).numpy() for rows in bits])


def run_draw(config: RunConfig, drawing: Drawing) -> int:
    """Draws what is missing of a drawing, and joins it; the replicas of this job share out the batches.

    Args:
        config: the run, checked; class-conditional. `sample` says how images are drawn.
        drawing: what is drawn.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    # There is no run folder for a log file.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    num_images = config.classes.num_classes * drawing.per_class
    batches = [
        range(start, min(start + drawing.batch_size, num_images)) for start in range(0, num_images, drawing.batch_size)
    ]
    with joined_ranks(config.parallel, timeout_s=_WAIT_S) as topology, StopRequest() as stop:
        checkpoint = find_checkpoint(drawing.where)
        record = drawing_record(config, drawing, checkpoint)
        missing = on_first_rank(lambda: _prepare(drawing, record, len(batches)))
        if missing:
            drawer = Drawer(config, drawing, checkpoint, topology)
            if not _draw_parts(drawer, drawing, batches, missing, topology, stop):
                logger.warning("stopped on request; run again to draw the rest")
                return EXIT_REQUEUE
        with all_ranks():
            if topology.rank == 0:
                _join(drawing, batches, config)
                logger.info("%d images in %s", num_images, drawing.out / SAMPLES_NAME)
    return EXIT_COMPLETE


def _draw_parts(
    drawer: Drawer, drawing: Drawing, batches: list[range], missing: list[int], topology: Topology, stop: StopRequest
) -> bool:
    """Draws the missing batches; returns False when a request to stop came first."""
    mine = missing[topology.data_rank :: topology.data_size]
    for turn in range(-(-len(missing) // topology.data_size)):
        if any_rank(stop.is_requested):
            return False
        if turn >= len(mine):
            continue
        begun_s = time.perf_counter()
        number = mine[turn]
        with refused_batch_size(drawing.batch_size, " and another --out"):
            images = drawer.draw(batches[number])
        if images is None:
            continue
        if drawing.has_pictures:
            for image_number, image in zip(batches[number], images, strict=True):
                with replacing(_picture_path(drawing.out, image_number), is_durable=False) as aside:
                    Image.fromarray(image).save(aside, format="PNG")
        with replacing(_part_path(drawing.out, number)) as aside, aside.open("wb") as file:
            np.save(file, images)
        seconds = (time.perf_counter() - begun_s) / len(images)
        logger.info("replica %d: %d of %d batches, %.3f s an image", topology.data_rank, turn + 1, len(mine), seconds)
    return not any_rank(stop.is_requested)


def drawing_record(config: RunConfig, drawing: Drawing, checkpoint: Path) -> dict[str, Any]:
    """What decides the images and their files; the parts of another drawing are refused."""
    section = asdict(config.sample)
    # The classes are the prompts; how often a run draws does not matter.
    settings = {key: value for key, value in section.items() if key not in ("prompts", "every_steps", "use_cache")}
    return {
        "checkpoint": str(checkpoint.resolve()),
        "num_classes": config.classes.num_classes,
        "per_class": drawing.per_class,
        "batch_size": drawing.batch_size,
        "pictures": drawing.has_pictures,
        "dtype": config.run.dtype,
        "time_shift": config.head.time_shift,
        "sample": settings | {"size_px": list(config.sample.size_px)},
    }


def _prepare(drawing: Drawing, record: dict[str, Any], num_batches: int) -> list[int]:
    """Makes the folder, or checks that it has this drawing begun; the batches that are missing."""
    path = drawing.out / RECORD_NAME
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in record if found.get(key) != record[key])
        if differing:
            key = differing[0]
            raise ConfigError(
                f"--out {drawing.out}: holds another drawing, of {key} = {json.dumps(found.get(key))}, not "
                f"{json.dumps(record[key])}; name another folder, or remove this one"
            )
    elif drawing.out.exists() and (not drawing.out.is_dir() or any(drawing.out.iterdir())):
        raise ConfigError(f"--out {drawing.out}: exists and holds no drawing; name a new folder")
    for name in (PARTS_DIR, *([IMAGES_DIR] if drawing.has_pictures else [])):
        (drawing.out / name).mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")
    if (drawing.out / SAMPLES_NAME).exists():
        return []
    return [number for number in range(num_batches) if not _part_path(drawing.out, number).exists()]


def _join(drawing: Drawing, batches: list[range], config: RunConfig) -> None:
    """Makes `samples.npz` and the grid of the batches, then removes them."""
    samples, parts = drawing.out / SAMPLES_NAME, drawing.out / PARTS_DIR
    if not samples.exists():
        _write_grid(drawing, batches, config)
        shape = (batches[-1].stop, *config.sample.size_px, 3)
        with replacing(samples) as aside:
            write_npz(aside, shape, (np.load(_part_path(drawing.out, number)) for number in range(len(batches))))
    shutil.rmtree(parts, ignore_errors=True)


def _write_grid(drawing: Drawing, batches: list[range], config: RunConfig) -> None:
    """The first image of each of the first classes."""
    num_classes = min(config.classes.num_classes, MAX_GRID_IMAGES)
    images = []
    for label in range(num_classes):
        batch, place = divmod(label * drawing.per_class, drawing.batch_size)
        images.append(np.load(_part_path(drawing.out, batch), mmap_mode="r")[place])
    names = ClassLabels(config.classes).names or [str(label) for label in range(num_classes)]
    image_grid(images, names[:num_classes], drawing.out / GRID_NAME, GRID_COLUMNS)


def _part_path(out: Path, batch: int) -> Path:
    return out / PARTS_DIR / f"{batch:06d}.npy"


def _picture_path(out: Path, number: int) -> Path:
    return out / IMAGES_DIR / f"{number:06d}.png"
