"""Training of the networks that draw images, of either family: steps, evaluation, pictures, scores.

The rest is `run.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.checkpoint.run_checkpoint import TrainState, load_checkpoint
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.adaptable import targets
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.observe.benchmark_scores import read_scores_of_run
from bitdance_scale.observe.metrics import EVALUATION_FILE, Evaluation, append_evaluation, read_evaluations
from bitdance_scale.observe.sample_grids import samples_path, write_samples
from bitdance_scale.parallel.agreement import all_ranks, first_rank_numbers, on_first_rank
from bitdance_scale.parallel.build import build_engine
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.parallel.step import StepLosses, train_step
from bitdance_scale.parallel.step_trace import StepTrace
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, phase
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.train.class_names import keep_class_names
from bitdance_scale.train.evaluation import Evaluator
from bitdance_scale.train.job import Job, Schedule
from bitdance_scale.train.learning_rate import learning_rate
from bitdance_scale.train.process import tolerant_output
from bitdance_scale.train.progress import Progress, StepMeter, progress_fields
from bitdance_scale.train.run import run_job
from bitdance_scale.train.run_observer import (
    RunObserver,
    draw_overview,
    show_result,
    write_result,
)
from bitdance_scale.train.sampling import decode_samples, draw_samples
from bitdance_scale.train.shared_index import run_index
from bitdance_scale.train.start_checks import check_resume
from bitdance_scale.train.starting import Base, check_base, find_base, load_adapters, load_base
from bitdance_scale.train.step_faults import StepFaults, compute_again, index_names, read_trace
from bitdance_scale.train.step_feed import ReadyStep, StepFeed, StepReader
from bitdance_scale.train.step_guards import Spike
from bitdance_scale.train.training_benchmark import BenchmarkResult, load_benchmarks
from bitdance_scale.vision.tokenizer import VisionTokenizer, vision_digest

logger = logging.getLogger(__name__)


def run_text_to_image(config: RunConfig) -> int:
    """Trains a stage of text-to-image in this process, one rank of a torchrun job or a job of one process.

    Args:
        config: the run, checked.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    return run_job(config, config.parallel, lambda topology, folder: TextToImageJob(config, topology, folder))


class TextToImageJob(Job):
    """A stage of text-to-image training on this rank.

    Args:
        config: the run, checked.
        topology: the ranks.
        run_folder: `<run.root>/<run.name>`.

    Attributes:
        progress: what was done since the start of the run.

    Raises:
        BitDanceError: on every rank, what is wrong with files or data, before any step.
    """

    def __init__(self, config: RunConfig, topology: Topology, run_folder: Path) -> None:
        super().__init__(config, topology, run_folder)
        self.config = config
        self._condition = load_condition(config)
        self._vision = VisionTokenizer(config.vision, topology.device)
        # Hashed once for all ranks: 1.5 s for the 1.8 GB of the published one.
        self._vision_digest = on_first_rank(lambda: vision_digest(config.vision))
        # Before the model, which takes minutes to build at full size.
        self._index = run_index(config)
        latest = self.newest_checkpoint()
        on_first_rank(lambda: keep_class_names(run_folder, config.classes, is_resumed=latest is not None))
        if latest is not None:
            on_first_rank(lambda: check_resume(latest, config))
        base = None
        if config.run.start_from and (latest is None or config.lora.is_used):
            base = find_base(config, run_folder, self._vision_digest, latest)
            if config.lora.is_used:
                on_first_rank(lambda: list(targets(config.network, self._condition.vocab_size, config.lora.targets)))
        self._evaluator = (
            Evaluator.read(config, self._condition, self._vision, topology) if config.evaluate.shards else None
        )
        self._benchmarks = load_benchmarks(config, self._condition, self._vision, topology)
        self._engine = build_engine(config, self._condition.vocab_size, topology)
        self._loader_state: dict[str, Any] | None = None
        self.progress = Progress()
        # What a checkpoint keeps of the release that the weights came from.
        self._release: dict[str, Any] = {}
        self._base_digest = base.digest if base is not None and config.lora.is_used else ""
        if base is not None:
            self._release = load_base(self._engine, base, config)
        if latest is not None:
            self.load_newest(latest, lambda path: self._resume(path, base))
        elif base is not None and config.lora.start_from:
            load_adapters(self._engine, base, config, self._condition)
        self._meter = StepMeter(config, self._condition.vocab_size, topology, self.progress)
        stages = [stage.number for stage in self._engine.stages]
        self._faults = StepFaults(topology, run_folder, stages, index_names(self._index))
        self._spike: Spike | None = None
        self._observer: RunObserver | None = None
        self._feed: StepFeed | None = None
        self._ready: ReadyStep | None = None

    @property
    def step(self) -> int:
        """Optimiser steps taken, skipped ones included."""
        return self.progress.step

    @property
    def schedule(self) -> Schedule:
        """What is due when."""
        config = self.config
        return Schedule(
            num_steps=config.run.steps,
            log=config.observe.log_every_steps,
            save=config.checkpoint.every_steps,
            evaluate=config.evaluate.every_steps if self._evaluator else 0,
            draw=config.sample.every_steps if config.sample.prompts else 0,
            benchmarks=tuple(benchmark.every_steps for benchmark in config.evaluate.benchmarks),
            draws_start=bool(config.run.start_from and config.sample.prompts and config.sample.every_steps),
        )

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Opens the loader, its feed and the sinks."""
        config, topology, step = self.config, self.topology, self.progress.step
        with (
            RunObserver(config, topology, self.run_folder, self._condition.vocab_size, step) as self._observer,
            StepReader(config, self._index, self._condition, self._vision, topology, self._loader_state) as reader,
            self._meter.stragglers.listening(),
            StepFeed(reader.next_step, self._prepare, step, config.run.steps, topology.device) as self._feed,
        ):
            self._observer.sources(reader.uses(config.run.steps), reader.filter_counts(), self._index, config.data)
            self.write_config()
            self._meter.restart()
            yield

    def read(self) -> None:
        """Takes the packs of the next step."""
        assert self._feed is not None, "steps are taken within a session"
        self._ready = self._feed.take()

    def take_step(self) -> bool:
        """Trains on the packs that were read."""
        ready, config = self._ready, self.config
        assert ready is not None and self._feed is not None, "a step is read before it is taken"
        self._lr = learning_rate(config.optim, self.progress.step, config.run.steps)
        self._spike, trace = None, StepTrace()
        self._losses, self._outcome = train_step(
            self._engine,
            ready.batch,
            config.loss,
            self._lr,
            self.topology,
            trace=trace,
            refuses=self._refuses if self.guards.judges_spikes else None,
            meanwhile=self._feed.read_ahead,
        )
        self._meter.add(ready, self._outcome.is_skipped)
        # Of the step that was trained, not of the one that is read already.
        self._loader_state = ready.loaded.state.to_dict()
        if self._outcome.is_skipped or self._spike is not None:
            with phase(Phase.LOGGING):
                self._explain(ready, trace)
        return self._outcome.is_skipped or self._outcome.is_refused

    def _refuses(self, losses: StepLosses, grad_norm: float) -> bool:
        """Judges the numbers of a step, the same ones on all ranks."""
        self._spike = self.guards.judge(*first_rank_numbers(losses.total, grad_norm))
        return self._spike is not None and self.guards.refuses_spikes

    def _explain(self, ready: ReadyStep, trace: StepTrace) -> None:
        """Says where a bad step came from."""
        batch, section = ready.batch, self.config.loss
        keys = [loaded_pack.pack.sample_keys.tolist() for loaded_pack in ready.loaded.packs]
        if self._spike is not None:
            readings = read_trace(trace, None, batch, keys, section)
            self._faults.explain_spike(self.step, self._spike, self._outcome.is_refused, readings)
            return
        again = compute_again(self._engine, batch, self.topology)
        self._faults.explain_non_finite(self.step, read_trace(trace, again, batch, keys, section))

    def log(self) -> None:
        """Writes the metrics of the steps since the last call."""
        metrics = self._meter.metrics(self._losses, self._outcome, self._lr, self.guards.num_spikes)
        with self.local_errors.kept():
            if self._observer is not None:
                self._observer.step(metrics)

    def evaluate(self) -> None:
        """Writes the losses on the held-out images, if the run has any."""
        evaluation = self._evaluate()
        with self.local_errors.kept():
            if evaluation is not None and self._observer is not None:
                self._observer.evaluation(evaluation, self.progress.images, draws_page=not self._due_scores())

    def draw(self) -> None:
        """Draws the configured prompts."""
        codes = self._draw_samples()
        with self.local_errors.kept():
            if self._observer is not None:
                self._observer.samples(self.progress.step, self._decode_samples(codes))

    def draw_start(self) -> None:
        """Draws the configured prompts with the weights that the run starts from, to be shown beside later pictures."""
        codes = self._draw_samples()
        with self.local_errors.kept():
            if self._observer is not None:
                self._observer.start(self._decode_samples(codes))

    def score(self, number: int) -> None:
        """Draws and scores one of the benchmarks."""
        result = self._score(number, self.local_errors.kept)
        with self.local_errors.kept():
            if result is not None and self._observer is not None:
                self._observer.benchmark(
                    result, self.progress.images, draws_page=number == max(self._due_scores(), default=number)
                )

    def lacking_scores(self) -> list[int]:
        """Benchmarks that are due after this step and have no score of it, in one of their metrics."""

        def lacking() -> list[int]:
            lines = read_scores_of_run(self.run_folder)
            there = {(line.benchmark, line.metric) for line in lines if line.step == self.step}
            sections = self.config.evaluate.benchmarks
            return [
                number
                for number in self._due_scores()
                if any((sections[number].shown_name, metric) not in there for metric in sections[number].metrics)
            ]

        return on_first_rank(lacking)

    def _due_scores(self) -> list[int]:
        """Numbers of the benchmarks that are scored after this step; none before the first."""
        due = [number for number, every_steps in enumerate(self.schedule.benchmarks) if self.is_due(every_steps)]
        return due if self.step else []

    def pause(self) -> None:
        """Leaves out of the speeds what happened since the last step."""
        self._meter.pause()

    def state(self) -> TrainState:
        """How far the run is."""
        fields = progress_fields(self.progress)
        fields["optimizer"] |= {"step": self._engine.optimizer_step()}
        assert self._loader_state is not None, "a checkpoint is of a step that was trained"
        return TrainState(
            loader=self._loader_state,
            tokenizer_digest=self._condition.digest,
            release=self._release,
            guards=self.guards.state(),
            vision_digest=self._vision_digest,
            base_digest=self._base_digest,
            **fields,
        )

    def model_values(self) -> Mapping[str, ShardedValue]:
        """What this rank holds of the parameters that are trained."""
        return self._engine.trained_values()

    def optimizer_values(self) -> Mapping[str, ShardedValue]:
        """What this rank holds of the optimiser's state."""
        return self._engine.optimizer_values()

    def finish(self) -> None:
        """Prints the loss table and where everything is."""
        with all_ranks():
            if self.topology.rank == 0:
                self._show_result()

    def _show_result(self) -> None:
        with tolerant_output():
            print("\n" + show_result(self.run_folder), flush=True)

    def complete(self) -> None:
        """Makes the losses on held-out images, pictures and scores of the last step, if they are not there."""
        lacks_evaluation, lacks_samples = on_first_rank(lambda: (self._lacks_evaluation(), self._lacks_samples()))
        lacking_scores = self.lacking_scores()
        evaluation = self._evaluate() if lacks_evaluation else None
        codes = self._draw_samples() if lacks_samples else []
        results = [self._score(number, all_ranks) for number in lacking_scores]
        with all_ranks():
            if self.topology.rank == 0 and (lacks_evaluation or lacks_samples or lacking_scores):
                if evaluation is not None:
                    append_evaluation(self.run_folder, evaluation)
                if lacks_samples:
                    write_samples(self.run_folder, self.step, self._decode_samples(codes), self.config.sample)
                for result in results:
                    if result is not None:
                        write_result(self.run_folder, result)
                draw_overview(self.run_folder)
                self._show_result()

    def _lacks_evaluation(self) -> bool:
        if self._evaluator is None:
            return False
        path = self.run_folder / EVALUATION_FILE
        evaluations = read_evaluations(path) if path.exists() else []
        return not evaluations or evaluations[-1].step < self.step

    def _lacks_samples(self) -> bool:
        return self.schedule.draw > 0 and not samples_path(self.run_folder, self.step).exists()

    def _evaluate(self) -> Evaluation | None:
        if self._evaluator is None:
            return None
        with self._engine.weights_of(self.config.evaluate.weights):
            return self._evaluator.evaluate(self._engine, self.progress.step)

    def _score(
        self, number: int, alone: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> BenchmarkResult | None:
        benchmark = self._benchmarks[number]
        with self._engine.weights_of(benchmark.section.weights):
            return benchmark.run(self._engine, self.progress.step, alone)

    def _draw_samples(self) -> list[np.ndarray]:
        """Codes of the images of the configured prompts on rank 0, nothing elsewhere; a collective."""
        with self._engine.weights_of(self.config.sample.weights):
            return draw_samples(self._engine, self.config, self._condition, self.topology)

    def _decode_samples(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The pictures, uint8 [H, W, 3] each; rank 0 decodes alone, and may run out of memory alone."""
        return decode_samples(codes, self.config, self._vision)

    def _resume(self, path: Path, base: Base | None) -> None:
        if base is not None:
            on_first_rank(lambda: check_base(path, base))
        # Once more, as it may be an older one than the newest, with other settings.
        told = on_first_rank(lambda: check_resume(path, self.config))
        state = load_checkpoint(
            path,
            self._engine.trained_values(),
            self._engine.optimizer_values(),
            tokenizer_digest=self._condition.digest,
            vision_digest=self._vision_digest,
        )
        self._engine.set_optimizer_step(state.optimizer["step"])
        self._loader_state = state.loader
        self._release = state.release
        self.restore_guards(state.guards, told)
        self.progress = Progress(
            step=state.step,
            images=state.images,
            tokens=state.tokens,
            images_by_resolution={int(side_px): count for side_px, count in state.images_by_resolution.items()},
            skipped_samples=state.skipped_samples,
            sample_errors=dict(state.sample_errors),
            skipped_steps=state.optimizer["skipped_steps"],
        )
        self._saved_step = state.step

    def _prepare(self, packs: Sequence[Pack], step: int) -> list[PackInputs]:
        """The micro-batches of a step on the device; called in the feed's thread."""
        config = self.config
        noises = [
            pack_noise(pack, config.vision.num_bits, config.run.seed, step, num_draws=config.head.diff_batch_mul)
            for pack in packs
        ]
        return [
            make_inputs(pack, noise, config, self.topology.device) for pack, noise in zip(packs, noises, strict=True)
        ]
