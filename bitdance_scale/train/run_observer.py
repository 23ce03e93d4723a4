"""What a run of a network that draws shows: summary, metrics, sample grids, one page of plots, and a last table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitdance_scale.atomic_files import is_storage_fault, write_bytes
from bitdance_scale.config.data_schema import DataSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.plan.filters import FilterCount, describe
from bitdance_scale.data.plan.plan import StreamUse
from bitdance_scale.data.plan.small_set import remarks
from bitdance_scale.observe.adapter_cost import trained_elements
from bitdance_scale.observe.benchmark_scores import BENCHMARKS_FILE, read_scores_of_run
from bitdance_scale.observe.console import loss_table
from bitdance_scale.observe.cost import count_parameters, peak_flops, step_flops
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.observe.metric_sink import EVALUATION_PANELS, STEP_PANELS, SUMMARIES
from bitdance_scale.observe.metrics import (
    METRICS_FILE,
    Evaluation,
    StepMetrics,
    append_record,
    read_metrics,
)
from bitdance_scale.observe.sample_grids import GRID_COLUMNS, newest_samples, write_samples, write_start
from bitdance_scale.parallel.stage_split import stage_split, typical_counts
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.run_sinks import RecordKinds, RunSinks

if TYPE_CHECKING:
    from bitdance_scale.train.training_benchmark import BenchmarkResult

logger = logging.getLogger(__name__)

OVERVIEW_FILE = "overview.png"
BENCHMARKS_DIR = "benchmarks"
# Utilisation at which the length of a run is estimated beforehand; what it really is, `mfu` says.
TYPICAL_MFU = 0.4


_KINDS = RecordKinds(StepMetrics, STEP_PANELS, EVALUATION_PANELS, SUMMARIES, Evaluation)


class RunObserver(RunSinks):
    """What a text-to-image run shows, on rank 0; on other ranks it does nothing. A context manager.

    Args:
        config: the run.
        topology: the ranks.
        run_folder: the run's folder.
        vocab_size: entries of the tokenizer.
        resumed_step: step the run goes on from; metrics of later steps are dropped, their work was lost.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, run_folder: Path, vocab_size: int, resumed_step: int
    ) -> None:
        is_active = topology.rank == 0
        if is_active:
            logger.info(_summary(config, topology, vocab_size, resumed_step))
        super().__init__(
            is_active=is_active,
            section=config.observe,
            config=config,
            run_folder=run_folder,
            num_steps=config.run.steps,
            resumed_step=resumed_step,
            kinds=_KINDS,
        )
        self._sample, self._has_text = config.sample, config.model.parts.has_text
        self._last_step, self._drawn_step = resumed_step, -1

    def close(self) -> None:
        """Draws the page of the last step, unless it is drawn."""
        if self._drawn_step < self._last_step:
            self._draw_overview()

    def sources(
        self,
        uses: Sequence[StreamUse],
        filters: Mapping[str, Sequence[FilterCount]],
        index: Index | None,
        data: DataSection,
    ) -> None:
        """Says what the filters leave out, what the whole run takes of every source, and what a small set lacks."""
        if self.is_active:
            for name, counts in filters.items():
                for count in counts:
                    logger.info("filter of %s: %s", f"source {name}" if name else "data", describe(count))
            logger.info(sources_summary(uses))
            for remark in remarks(index, data) if index is not None else ():
                logger.warning(remark)

    def step(self, metrics: StepMetrics) -> None:
        """Records a logged step everywhere."""
        self.write_step(
            metrics,
            metrics.loss,
            {"vision": metrics.loss_vision} | ({"text": metrics.loss_text} if self._has_text else {}),
            grad_norm=metrics.grad_norm,
            images_per_s=metrics.images_per_s,
            step_s=metrics.step_s,
        )
        self._last_step = metrics.step

    def evaluation(self, evaluation: Evaluation, images: int, *, draws_page: bool = True) -> None:
        """Records the losses on held-out images everywhere.

        Args:
            evaluation: the losses.
            images: those trained on so far.
            draws_page: whether the page of plots is drawn, because nothing else of this step will be on it.
        """
        if not self.is_active:
            return
        self.write_evaluation(evaluation, images)
        by_resolution = ", ".join(f"{side} px {loss:.4f}" for side, loss in evaluation.vision_by_resolution.items())
        by_time = " ".join(f"{loss:.3f}" for loss in evaluation.vision_by_time)
        logger.info(
            "held out after step %d: vision %.4f (%s; by flow time %s)%s",
            evaluation.step,
            evaluation.vision,
            by_resolution,
            by_time,
            f", text {evaluation.text:.4f}" if self._has_text else "",
        )
        self._last_step = evaluation.step
        if draws_page:
            self._draw_overview()

    def samples(self, step: int, images: Sequence[np.ndarray]) -> None:
        """Writes the grid of a step's pictures, uint8 [H, W, 3] each, one per prompt."""
        if self.is_active:
            with self.faults.tolerated(f"samples of step {step}"):
                self.log_picture(step, "samples", write_samples(self.run_folder, step, images, self._sample))

    def start(self, images: Sequence[np.ndarray]) -> None:
        """Keeps the start's pictures, beside which those of later steps are shown; arguments as in `samples`."""
        if self.is_active:
            with self.faults.tolerated("samples of the start"):
                write_start(self.run_folder, images, self._sample)

    def benchmark(self, result: BenchmarkResult, images: int, *, draws_page: bool = True) -> None:
        """Records the scores of a benchmark everywhere; arguments as in `evaluation`."""
        if not self.is_active:
            return
        for scores in result.scores:
            self.write_scores(scores, images)
            logger.info("%s", scores.summary())
            self._last_step = scores.step
        first = result.scores[0]
        with self.faults.tolerated(f"pictures of {first.benchmark} of step {first.step}"):
            name = f"benchmark/{first.benchmark}".replace("-", "_")
            self.log_picture(first.step, name, write_scored(self.run_folder, result))
        if draws_page:
            self._draw_overview()

    def _draw_overview(self) -> None:
        try:
            self.log_picture(self._last_step, "overview", draw_overview(self.run_folder))
        except Exception as error:  # A picture must not end a run.
            if is_storage_fault(error):
                self.faults.warn(OVERVIEW_FILE, error)
            else:
                logger.warning("%s could not be drawn", OVERVIEW_FILE, exc_info=True)
        self._drawn_step = self._last_step


def draw_overview(run_folder: Path) -> Path:
    """Draws the page of a run from what its folder holds."""
    # matplotlib takes a second to import, and only the rank that draws needs it.
    from bitdance_scale.observe.overview import overview
    from bitdance_scale.observe.run_record import read_run

    path = run_folder / OVERVIEW_FILE
    write_bytes(path, overview([read_run(run_folder)]))
    return path


def sources_summary(uses: Sequence[StreamUse]) -> str:
    """One line per source: images that the run takes of it, and how often it goes through those of each resolution."""
    by_source: dict[str, list[StreamUse]] = {}
    for use in uses:
        by_source.setdefault(use.source, []).append(use)
    num_images = sum(use.num_images for use in uses)
    lines = []
    for name, streams in by_source.items():
        taken = sum(use.num_images for use in streams)
        parts = [
            f"{use.side_px} px {use.epochs:.3g} epochs of {use.num_samples:,} images"
            if use.num_samples
            else f"{use.side_px} px none is large enough, its share goes to the other sources"
            for use in streams
        ]
        title = f"source {name}" if name else "data"
        lines.append(f"{title}: {taken:,} images in all, {taken / num_images:.2%}; {', '.join(parts)}")
    return "\n".join(lines)


def write_scored(run_folder: Path, result: BenchmarkResult) -> Path:
    """Writes the grid of a benchmark's pictures that are shown, each under its prompt and what the scorer found."""
    first = result.scores[0]
    path = run_folder / BENCHMARKS_DIR / first.benchmark / f"step_{first.step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid([image.pixels for image in result.shown], [image.caption for image in result.shown], path, GRID_COLUMNS)
    return path


def write_result(run_folder: Path, result: BenchmarkResult) -> None:
    """Writes the scores of a benchmark, and their grid, into the run folder."""
    for scores in result.scores:
        append_record(run_folder / BENCHMARKS_FILE, scores)
    write_scored(run_folder, result)


def show_result(run_folder: Path) -> str:
    """The loss table of a run, and the places of everything written."""
    metrics = read_metrics(run_folder / METRICS_FILE)
    grid = newest_samples(run_folder)
    scores = {line.series: line for line in read_scores_of_run(run_folder)}
    places = [f"overview     {run_folder / OVERVIEW_FILE}", f"metrics      {run_folder / METRICS_FILE}"]
    places += [f"samples      {grid}"] if grid else []
    places += [f"checkpoints  {run_folder / 'checkpoints'}"]
    places += [f"W&B          {run_folder / 'wandb'}"] if (run_folder / "wandb").exists() else []
    places += [f"benchmarks   {run_folder / BENCHMARKS_FILE}"] if scores else []
    table = loss_table(metrics) if metrics else "no metrics were written"
    return "\n".join([table, *(line.summary() for line in scores.values()), "", *places])


def _summary(config: RunConfig, topology: Topology, vocab_size: int, resumed_step: int) -> str:
    parts = count_parameters(config, vocab_size)
    sizes = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in parts.items())
    if config.lora.is_used:
        trained = trained_elements(config, vocab_size, parts["projector"])
        sizes += f"; frozen, and beside them {trained / 1e6:,.2f} M are trained (rank {config.lora.rank})"
    parallel = config.parallel
    layout = f"tensor {topology.tensor_size} x pipeline {topology.pipeline_size} x data {topology.data_size}"
    layout += ", sequence parallel" if parallel.sequence_parallel else ""
    if parallel.num_stages > 1:
        layout += f", layers per stage {' + '.join(map(str, stage_split(config, vocab_size)))}"
    steps = f"steps {resumed_step} to {config.run.steps}, {_step_size(config, topology, vocab_size, resumed_step)}"
    is_megatron = parallel.optimizer == "megatron"
    divided = "Megatron-core's distributed optimiser" if is_megatron else f"ZeRO-{parallel.zero_stage}"
    engines = f"{divided}, recompute {parallel.recompute}, {config.run.dtype}"
    return f"parameters: {sizes}\nlayout: {layout}, {engines}\n{steps}"


def _step_size(config: RunConfig, topology: Topology, vocab_size: int, resumed_step: int) -> str:
    """What a step holds on the configured mix with typical captions, and how long the run takes on a known device."""
    num_images, counts = typical_counts(config)
    batch = config.data.global_batch
    flops = step_flops(config, vocab_size, counts).training / num_images * batch
    text = f"{batch:,} images, about {counts.num_positions / num_images * batch:,.0f} tokens and {flops:.2e} FLOP each"
    peak = peak_flops(topology.device_name, config.run.dtype)
    if peak is None:
        return text
    step_s = flops / (topology.world_size * peak * TYPICAL_MFU)
    days = step_s * (config.run.steps - resumed_step) / 86_400
    return f"{text}; {step_s:.1f} s a step and {days:.1f} days at {TYPICAL_MFU:.0%} of the devices' peak"
