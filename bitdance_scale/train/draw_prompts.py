"""Draws the prompts of a benchmark, shared out over the ranks of a job, into the folder that its scorer reads.

Prompts are texts or classes, as the model wants them.

Which images are drawn together depends on the prompts and the size of batches alone, and an image has a seed of its
own. So the bytes of a drawing do not depend on the number of replicas, on their order, nor on how often it was stopped:
a batch of which an image is missing is drawn again whole, and only what is missing is written.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.errors import TrainingError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.layout import Layout
from bitdance_scale.evaluation.benchmarks.manifest import Drawing, begin_drawing
from bitdance_scale.evaluation.benchmarks.prompt import Place, Prompt, image_seed, rounds
from bitdance_scale.evaluation.progress import Progress
from bitdance_scale.generate.out_of_memory import refused_batch_size
from bitdance_scale.generate.requests import MAX_GRID_COLUMNS, MAX_GRID_IMAGES
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.parallel.agreement import all_ranks, any_rank, on_first_rank
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest
from bitdance_scale.train.prompt_models import PromptModel
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.run_lock import RunLock

logger = logging.getLogger(__name__)

_WAIT_S = 14 * 24 * 3600.0
_BEAT_S = 5.0
_ANOTHER_OUT = " and another --out: a drawing is of one size of batches, which its images depend on by rounding"


@dataclass(frozen=True)
class PromptDrawing:
    """What is drawn.

    Attributes:
        out: the folder.
        benchmark: lays it out.
        prompts: of the benchmark.
        model_name: what the model is called in paths.
        describe: all that decides the images, as `drawing.json` has it; called by the first rank.
        batch_size: images that a replica draws together.
        has_copies: whether images of an array are written as PNGs too.
        doubt: what to warn of; empty if nothing.
        appended: words that the model is given behind every prompt, and scorers do not see.
    """

    out: Path
    benchmark: Benchmark
    prompts: Sequence[Prompt]
    model_name: str
    describe: Callable[[], Drawing]
    batch_size: int
    has_copies: bool = False
    doubt: str = ""
    appended: str = ""

    def asked(self, place: Place) -> str:
        """What the model is given for an image."""
        text = self.prompts[place[0]].text
        return f"{text} {self.appended}" if self.appended else text


def shares(prompts: Sequence[Prompt], batch_size: int, *, are_whole: bool) -> list[list[list[Place]]]:
    """All images in order, as shares that a replica draws one after another, each of batches of images.

    Args:
        prompts: of the benchmark.
        batch_size: most images of a batch.
        are_whole: whether a share has whole prompts, because the pictures of a prompt may be one file: as many as fill
            a batch, or one prompt of more images in several batches. Otherwise a share is one batch, in `rounds`.
    """
    if not are_whole:
        places = rounds(prompts)
        return [[places[start : start + batch_size]] for start in range(0, len(places), batch_size)]
    found: list[list[list[Place]]] = []
    for number, prompt in enumerate(prompts):
        places = [(number, k) for k in range(prompt.num_images)]
        if found and len(found[-1]) == 1 and len(found[-1][0]) + len(places) <= batch_size:
            found[-1][0].extend(places)
        else:
            found.append([places[start : start + batch_size] for start in range(0, len(places), batch_size)])
    return found


def run_draw_prompts(drawing: PromptDrawing, parallel: ParallelSection, load: Callable[[Topology], PromptModel]) -> int:
    """Draws what is missing of a drawing; the replicas of this job share out the batches.

    Args:
        drawing: what is drawn.
        parallel: layout of a replica.
        load: the model on a rank; called only if something is missing.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    # There is no run folder for a log file.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with joined_ranks(parallel, timeout_s=_WAIT_S) as topology, StopRequest() as stop, contextlib.ExitStack() as opened:
        # Refused before a lock is written into what may be somebody's folder.
        record = on_first_rank(lambda: _begin(drawing))
        with all_ranks():
            if topology.rank == 0:
                opened.enter_context(_held(RunLock(drawing.out)))
        if drawing.doubt and topology.rank == 0:
            logger.warning("%s", drawing.doubt)
        layout = drawing.benchmark.layout(drawing.model_name)
        folder = ImageFolder(drawing.out, layout, drawing.prompts, record.size_px)
        missing = on_first_rank(lambda: _missing(drawing, folder, layout))
        if missing:
            with all_ranks():
                model = load(topology)
            if not _draw(drawing, record.seed, folder, model, missing, topology, stop):
                logger.warning("stopped on request; run again to draw the rest")
                return EXIT_REQUEUE
        with all_ranks():
            if topology.rank == 0:
                folder.finish()
                if layout.overview is not None:
                    _write_overview(folder, drawing.prompts, drawing.out / layout.overview)
        if drawing.has_copies:
            with all_ranks():
                folder.write_copies(topology.rank, topology.world_size)
        if topology.rank == 0:
            logger.info("%s: all images of %d prompts are there", drawing.out, len(drawing.prompts))
    return EXIT_COMPLETE


def _begin(drawing: PromptDrawing) -> Drawing:
    record = drawing.describe()
    begin_drawing(drawing.out, record)
    return record


@dataclass(frozen=True)
class _Batch:
    """Images that are drawn together.

    Attributes:
        places: the images.
        missing: those of them that are written.
    """

    places: Sequence[Place]
    missing: frozenset[Place]


def _write_overview(folder: ImageFolder, prompts: Sequence[Prompt], path: Path) -> None:
    """The first image of each of the first prompts, if it is not there yet."""
    if not path.exists():
        shown = prompts[:MAX_GRID_IMAGES]
        images = [folder.read(prompt)[0] for prompt in shown]
        image_grid(images, [prompt.category for prompt in shown], path, MAX_GRID_COLUMNS)


def _missing(drawing: PromptDrawing, folder: ImageFolder, layout: Layout) -> list[list[_Batch]]:
    """The batches of every share of which an image is missing; shares without one are left out."""
    state = folder.state()
    state.refuse_foreign()
    lacking = {prompt_id: frozenset(numbers) for prompt_id, numbers in state.to_draw.items()}
    found = []
    for share in shares(drawing.prompts, drawing.batch_size, are_whole=layout.makes_files):
        batches = [
            _Batch(places, frozenset((n, k) for n, k in places if k in lacking.get(drawing.prompts[n].id, ())))
            for places in share
        ]
        if any(batch.missing for batch in batches):
            found.append([batch for batch in batches if batch.missing])
    return found


def _draw(
    drawing: PromptDrawing,
    seed: int,
    folder: ImageFolder,
    model: PromptModel,
    missing: Sequence[Sequence[_Batch]],
    topology: Topology,
    stop: StopRequest,
) -> bool:
    """Draws the missing batches; returns False when a request to stop came first."""
    progress = Progress(sum(len(batch.missing) for share in missing for batch in share))
    for start in range(0, len(missing), topology.data_size):
        turn = missing[start : start + topology.data_size]
        for number in range(max(map(len, turn))):
            if any_rank(stop.is_requested):
                return False
            batches = [share[number] if number < len(share) else None for share in turn]
            mine = batches[topology.data_rank] if topology.data_rank < len(batches) else None
            if mine is not None:
                with refused_batch_size(drawing.batch_size, _ANOTHER_OUT):
                    _draw_batch(drawing, seed, folder, model, mine)
            progress.add(sum(len(batch.missing) for batch in batches if batch is not None))
            if topology.rank == 0:
                progress.log()
    return not any_rank(stop.is_requested)


def _draw_batch(drawing: PromptDrawing, seed: int, folder: ImageFolder, model: PromptModel, batch: _Batch) -> None:
    prompts = drawing.prompts
    texts = [drawing.asked(place) for place in batch.places]
    seeds = [image_seed(seed, prompts[number].id, k) for number, k in batch.places]
    images = model.draw(texts, seeds)
    if images is None:
        return
    for (number, k), image in zip(batch.places, images, strict=True):
        if (number, k) in batch.missing:
            folder.write_image(prompts[number], k, image)


@contextlib.contextmanager
def _held(lock: RunLock) -> Iterator[None]:
    """Holds a lock, which must be touched every few seconds; a thread does."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            try:
                lock.beat()
            except TrainingError as error:
                # Images are written whole, so that two drawings of one folder waste time and do no harm.
                logger.warning("%s", error)
                return

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    with lock:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
