"""A benchmark drawn and scored with the model as it is, on the ranks that train it.

All images are dealt in batches that depend on the prompts and `batch_size` alone, and an image has a seed of its own,
as in `draw_prompts.py`: replicas, their number and their order do not matter. The replicas draw at the same time, each
scores its own images on its first rank, and the first rank of all gets the scores.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from bitdance_scale.config.benchmark_schema import RunBenchmark
from bitdance_scale.config.schema import RunConfig, SampleSection
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, image_seed
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage, PictureScorer, on_device
from bitdance_scale.evaluation.picture_scorers import ClipScorer, ScorerNetworks, load_picture_scorer
from bitdance_scale.evaluation.run_benchmarks import read_run_benchmark
from bitdance_scale.observe.benchmark_scores import BenchmarkScores
from bitdance_scale.parallel.agreement import all_ranks, from_all_ranks
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, phase
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.train.sampling import BatchDrawer, sample_grid
from bitdance_scale.vision.tokenizer import VisionTokenizer

logger = logging.getLogger(__name__)

NUM_SHOWN = 12
"""Most pictures that are shown of a score; the same ones every time."""


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """A picture that is shown, uint8 [H, W, 3], and its prompt with what the scorers found."""

    pixels: np.ndarray
    caption: str


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """What the first rank knows of a benchmark at a step.

    Attributes:
        scores: one for each metric.
        shown: some of the pictures.
    """

    scores: Sequence[BenchmarkScores]
    shown: Sequence[ShownImage]


Share = tuple[dict[str, list[ImageScore]], dict[int, ShownImage]]
"""What a replica has found: scores by metric, and the pictures that are shown by their numbers."""
DrawnBits = tuple[Prompt, int, torch.Tensor]
"""An image before it is decoded: its prompt, its `k`, and its bits or latents, float32 [h * w, C] on the CPU."""


class TrainingBenchmark:
    """A benchmark of a run. All ranks make it and call it alike.

    Args:
        section: what is drawn, and how.
        config: the run.
        prompts: those that are drawn.
        scorers: by name of their metric, on the first rank of every replica; others need none.
        condition: of the run.
        vision: decodes the pictures.
        topology: the ranks.
    """

    def __init__(
        self,
        section: RunBenchmark,
        config: RunConfig,
        prompts: Sequence[Prompt],
        scorers: Mapping[str, PictureScorer],
        condition: Condition,
        vision: VisionTokenizer,
        topology: Topology,
    ) -> None:
        self.section, self._scorers = section, scorers
        self._condition, self._vision, self._topology = condition, vision, topology
        self._config = dataclasses.replace(config, sample=_sample_section(section, config))
        images = [(prompt, k) for prompt in prompts for k in range(prompt.num_images)]
        size = section.batch_size
        self._batches = [images[start : start + size] for start in range(0, len(images), size)]
        self._ids = [condition.prompt_ids(prompt.text) for prompt, _ in images]
        self._shown = _spread(prompts)

    @classmethod
    def load(
        cls,
        section: RunBenchmark,
        config: RunConfig,
        networks: ScorerNetworks,
        condition: Condition,
        vision: VisionTokenizer,
        topology: Topology,
    ) -> TrainingBenchmark:
        """Reads the prompts and, on the first rank of every replica, the networks of the scorers; a collective.

        Raises:
            BitDanceError: on all ranks, what is missing or wrong.
        """
        scorers: dict[str, PictureScorer] = {}
        # Networks are made before their weights are read, with random numbers of this process.
        with all_ranks(), torch.random.fork_rng(devices=[]):
            prompts = read_run_benchmark(section)
            if topology.is_reader:
                scorers = {
                    metric: load_picture_scorer(metric, networks, detector=section.detector, clip=section.clip)
                    for metric in section.metrics
                }
        if topology.rank == 0:
            _warn_of_cut(section, prompts, scorers)
        return cls(section, config, prompts, scorers, condition, vision, topology)

    def run(
        self, engine: TrainingEngine, step: int, alone: Callable[[], AbstractContextManager[None]]
    ) -> BenchmarkResult | None:
        """Draws and scores with the weights that the model has; a collective.

        Args:
            engine: the model after `step` steps.
            step: optimiser steps taken.
            alone: encloses what a rank does alone: it keeps an error, or raises it on all ranks.

        Returns:
            The result on the first rank; None on all others, and where the scores of a replica failed.
        """
        begun_s = time.monotonic()
        drawn = self._draw(engine)
        share: Share | None = None
        with alone():
            share = self._score(self._decode(drawn))
        # Ranks at the same place of all replicas; those of the first rank are the ones that have scored.
        shares = from_all_ranks(share, self._topology.data_group)
        found = [share for share in shares if share is not None]
        result: BenchmarkResult | None = None
        with alone():
            if self._topology.rank == 0 and len(found) == len(shares):
                result = self._result(found, step, time.monotonic() - begun_s)
        return result

    def _draw(self, engine: TrainingEngine) -> list[DrawnBits]:
        """The images of this replica on its first rank; nothing on the others."""
        topology, size = self._topology, self.section.batch_size
        drawn: list[DrawnBits] = []
        drawer = BatchDrawer(engine, self._config, self._condition, topology)
        for start in range(0, len(self._batches), topology.data_size):
            number = start + topology.data_rank
            is_mine = number < len(self._batches)
            # Every replica draws as often, some another's batch, because ZeRO-3 gathers weights at every call.
            number = number if is_mine else start
            batch = self._batches[number]
            ids = self._ids[number * size : number * size + len(batch)]
            seeds = [image_seed(self.section.seed, prompt.id, k) for prompt, k in batch]
            # A phase of its own: a batch is progress, and may take as long as a whole phase.
            with phase(Phase.DRAWING):
                bits = drawer.draw(ids, seeds)
                if is_mine and topology.is_reader:
                    drawn += [(prompt, k, rows) for (prompt, k), rows in zip(batch, bits.cpu(), strict=True)]
        return drawn

    def _decode(self, drawn: Sequence[DrawnBits]) -> list[DrawnImage]:
        """The pictures of this replica's images."""
        grid = sample_grid(self._config)
        images: list[DrawnImage] = []
        for prompt, k, bits in drawn:
            # A phase of its own, as a batch that is drawn has.
            with phase(Phase.DRAWING):
                images.append(DrawnImage(prompt, k, self._vision.decode(bits, grid).numpy()))
        return images

    def _score(self, images: Sequence[DrawnImage]) -> Share:
        """Scores of this replica's images, in the batches that they were drawn in; networks are moved for the time."""
        size = self.section.batch_size
        scores: dict[str, list[ImageScore]] = {}
        with on_device(self._scorers.values(), self._topology.device):
            for metric, scorer in self._scorers.items():
                # Every batch but the very last is full, so slicing by size gives the batches that were drawn.
                found = [scorer(images[start : start + size]) for start in range(0, len(images), size)]
                scores[metric] = [score for part in found for score in part]
        shown = {
            self._shown[image.prompt.id]: ShownImage(
                image.pixels, _caption(image.prompt.text, [found[place] for found in scores.values()])
            )
            for place, image in enumerate(images)
            if image.k == 0 and image.prompt.id in self._shown
        }
        return scores, shown

    def _result(self, shares: Sequence[Share], step: int, drawn_s: float) -> BenchmarkResult:
        lines = []
        for metric in self._scorers:
            images = [score for scores, _ in shares for score in scores[metric]]
            found = estimates(images, find_metric(metric).combine)
            lines.append(
                BenchmarkScores(
                    step=step,
                    benchmark=self.section.shown_name,
                    metric=metric,
                    values={name: one.value for name, one in found.items()},
                    low={name: one.low for name, one in found.items()},
                    high={name: one.high for name, one in found.items()},
                    num_images=len(images),
                    drawn_s=round(drawn_s, 3),
                )
            )
        shown = {number: picture for _, pictures in shares for number, picture in pictures.items()}
        return BenchmarkResult(lines, [shown[number] for number in sorted(shown)])


def load_benchmarks(
    config: RunConfig, condition: Condition, vision: VisionTokenizer, topology: Topology
) -> list[TrainingBenchmark]:
    """Those of `evaluate.benchmarks`, networks that several name being read once; a collective.

    Raises:
        BitDanceError: on all ranks, what is missing or wrong.
    """
    networks = ScorerNetworks()
    return [
        TrainingBenchmark.load(section, config, networks, condition, vision, topology)
        for section in config.evaluate.benchmarks
    ]


def _warn_of_cut(section: RunBenchmark, prompts: Sequence[Prompt], scorers: Mapping[str, PictureScorer]) -> None:
    texts = [prompt.text for prompt in prompts]
    for metric, scorer in scorers.items():
        num_cut = scorer.num_cut(texts) if isinstance(scorer, ClipScorer) else 0
        if num_cut:
            logger.warning(
                "%s: %d of %d prompts are longer than CLIP reads, so %s is of their beginnings",
                section.shown_name, num_cut, len(texts), metric,
            )  # fmt: skip


def _sample_section(section: RunBenchmark, config: RunConfig) -> SampleSection:
    """How the images are drawn."""
    sample = config.sample
    return dataclasses.replace(
        sample,
        size_px=section.size_px if all(section.size_px) else sample.size_px,
        num_steps=section.num_steps or sample.num_steps,
        guidance=section.guidance or sample.guidance,
        # Images have seeds of their own, which are streams of this one, as in `bitdance evaluate draw`.
        seed=0,
    )


def _spread(prompts: Sequence[Prompt]) -> dict[str, int]:
    """Prompt id -> place of the first image of a prompt that is shown: the first of each category, the second, ..."""
    seen: dict[str, int] = {}
    order = []
    for number, prompt in enumerate(prompts):
        seen[prompt.category] = seen.get(prompt.category, 0) + 1
        order.append((seen[prompt.category], number, prompt.id))
    return {prompt_id: place for place, (_, _, prompt_id) in enumerate(sorted(order)[:NUM_SHOWN])}


def _caption(text: str, scores: Sequence[ImageScore]) -> str:
    """The prompt, with the scores in front that are not 1."""
    marks = {0.0: "WRONG: ", 1.0: ""}
    return "".join(marks.get(score.value, f"{score.value:.3g}: ") for score in scores) + text
