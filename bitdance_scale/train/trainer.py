"""The training loop: read, step, observe, sample, save, until the last step or a request to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import TrainState, load_checkpoint, save_checkpoint
from bitdance_scale.checkpoint.start_weights import find_checkpoint, load_start_weights
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import BitDanceError, TrainingError
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.observe.metrics import Evaluation
from bitdance_scale.parallel.agreement import any_rank, on_first_rank
from bitdance_scale.parallel.build import build_engine
from bitdance_scale.parallel.step import train_step
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.sequence.tokens import load_text_tokenizer
from bitdance_scale.train.evaluation import Evaluator
from bitdance_scale.train.feed import FedStep, StepFeed
from bitdance_scale.train.progress import Progress, StepMeter, learning_rate, progress_fields
from bitdance_scale.train.reading import StepReader
from bitdance_scale.train.run_observer import RunObserver
from bitdance_scale.train.sampling import draw_samples
from bitdance_scale.train.shared_index import training_index
from bitdance_scale.train.signals import StopRequest
from bitdance_scale.train.start_checks import Start, check_resume, check_start
from bitdance_scale.vision.tokenizer import VisionTokenizer

logger = logging.getLogger(__name__)


class Trainer:
    """One run on this rank: the model under its layout, its data, its folder.

    Building it resumes the newest checkpoint of the run folder, if there is one. All ranks do everything alike.

    Args:
        config: the run, checked.
        topology: the ranks.
        run_folder: `<run.root>/<run.name>`.

    Raises:
        BitDanceError: on every rank, what is wrong with files or data, before any step.
    """

    def __init__(self, config: RunConfig, topology: Topology, run_folder: Path) -> None:
        self.config, self.topology, self.run_folder = config, topology, run_folder
        self._text = load_text_tokenizer(
            config.text, config.vision.block_tokens, is_causal=config.model.mask == "causal"
        )
        self._vision = VisionTokenizer(config.vision, topology.device)
        self._checkpoints = CheckpointFolder(run_folder / "checkpoints", keep=config.checkpoint.keep)
        # Before the model, which takes minutes to build at full size.
        self._index = training_index(config.data)
        latest = self._checkpoints.latest()
        if latest is not None:
            on_first_rank(lambda: check_resume(latest, config))
        start = self._find_start() if latest is None and config.run.start_from else None
        self._evaluator = Evaluator.read(config, self._text, self._vision, topology) if config.evaluate.shards else None
        self._engine = build_engine(config, self._text.vocab_size, topology)
        self._loader_state: dict[str, object] | None = None
        self.progress = Progress()
        self._saved_step = 0
        # What a checkpoint keeps of the release that the weights came from.
        self._release: dict[str, object] = {}
        if latest is not None:
            self._resume(latest)
        elif start is not None:
            self._start(start)

    @property
    def is_complete(self) -> bool:
        """Whether the last configured step has been taken."""
        return self.progress.step >= self.config.run.steps

    def train(self, stop: StopRequest) -> bool:
        """Trains to the last step and saves; returns False when a request to stop came first (saved as well).

        Raises:
            TrainingError: gradients stayed non-finite for `optim.max_skipped_steps` steps.
            DataError: the loader found too much unreadable data; what was trained until then is saved.
        """
        config, topology, progress = self.config, self.topology, self.progress
        meter = StepMeter(config, self._text.vocab_size, topology, progress)
        num_skipped_in_a_row = 0
        with (
            RunObserver(config, topology, self.run_folder, self._text.vocab_size, progress.step) as observer,
            StepReader(config, self._index, self._text, self._vision, topology, self._loader_state) as reader,
            StepFeed(reader.next_step, self._prepare, progress.step, config.run.steps, topology.device) as feed,
        ):
            observer.sources(reader.uses(config.run.steps), reader.filter_counts())
            if progress.step == 0:
                self._evaluate(observer)
                meter.pause()
            while not self.is_complete:
                fed = self._take(feed)
                lr = learning_rate(config.optim, progress.step, config.run.steps)
                losses, outcome = train_step(self._engine, fed.batch, config.loss, lr, topology)
                meter.add(fed.packs, fed.report, fed.wait_s, outcome.is_skipped)
                # Of the step that was trained, not of the one that is read already.
                self._loader_state = fed.report.loader
                num_skipped_in_a_row = num_skipped_in_a_row + 1 if outcome.is_skipped else 0
                self._check_skipped(num_skipped_in_a_row)
                if self._is_due(config.observe.log_every_steps):
                    observer.step(meter.metrics(losses, outcome, lr))
                if any_rank(stop.is_requested):
                    self.save()
                    return False
                if self._is_due(config.checkpoint.every_steps):
                    self.save()
                if self._is_due(config.evaluate.every_steps):
                    self._evaluate(observer)
                if config.sample.prompts and config.sample.every_steps and self._is_due(config.sample.every_steps):
                    observer.samples(progress.step, self.draw_samples())
                meter.pause()
        return True

    def draw_samples(self) -> list[np.ndarray]:
        """Draws the configured prompts; uint8 [H, W, 3] each on rank 0, nothing elsewhere."""
        return draw_samples(self._engine, self.config, self._text, self._vision, self.topology)

    def evaluate(self) -> Evaluation | None:
        """The losses on the held-out images, on all ranks alike; None: the run has none."""
        if self._evaluator is None:
            return None
        return self._evaluator.evaluate(self._engine, self.progress.step)

    def save(self) -> None:
        """Commits a checkpoint of the present step, unless there is one."""
        if self._saved_step == self.progress.step:
            return
        begun_s = time.monotonic()
        fields = progress_fields(self.progress)
        fields["optimizer"] |= {"step": self._engine.optimizer_step()}
        state = TrainState(
            loader=self._loader_state, tokenizer_digest=self._text.digest, release=self._release, **fields
        )
        save_checkpoint(
            self._checkpoints,
            state,
            self._engine.model_values(),
            self._engine.optimizer_values(),
            dump_toml(self.config),
        )
        self._saved_step = self.progress.step
        logger.info("checkpoint of step %d written in %.1f s", self.progress.step, time.monotonic() - begun_s)

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(
            path,
            self._engine.model_values(),
            self._engine.optimizer_values(),
            tokenizer_digest=self._text.digest,
        )
        self._engine.set_optimizer_step(state.optimizer["step"])
        self._loader_state = state.loader
        self._release = state.release
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
        logger.info("resumed from %s", path)

    def _take(self, feed: StepFeed) -> FedStep:
        try:
            return feed.take()
        except BitDanceError:
            # Raised on all ranks. Nothing is wrong with the steps before this one.
            self.save()
            raise

    def _evaluate(self, observer: RunObserver) -> None:
        evaluation = self.evaluate()
        if evaluation is not None:
            observer.evaluation(evaluation, self.progress.images)

    def _find_start(self) -> Start:
        """What `run.start_from` means, and whether the stage can start from it."""
        path = find_checkpoint(self.config.run.start_from)
        return on_first_rank(lambda: check_start(path, self.config))

    def _start(self, start: Start) -> None:
        prefix = "master."
        values = self._engine.optimizer_values()
        masters = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        self._release = load_start_weights(
            start.path,
            self._engine.model_values(),
            masters,
            tokenizer_digest=start.tokenizer_digest,
            new_queries=start.new_queries,
        )
        logger.info("started from the weights of %s", start.path)

    def _prepare(self, packs: Sequence[Pack], step: int) -> list[PackInputs]:
        """The micro-batches of a step on the device; called in the feed's thread."""
        config = self.config
        noises = [pack_noise(pack, config.vision.num_bits, config.run.seed, step) for pack in packs]
        return [
            make_inputs(pack, noise, config, self.topology.device) for pack, noise in zip(packs, noises, strict=True)
        ]

    def _is_due(self, every_steps: int) -> bool:
        """Whether something done every so many steps, and after the last one, is due now."""
        return self.progress.step % every_steps == 0 or self.is_complete

    def _check_skipped(self, num_skipped_in_a_row: int) -> None:
        if num_skipped_in_a_row > self.config.optim.max_skipped_steps:
            raise TrainingError(
                f"step {self.progress.step}: the gradient was not finite in {num_skipped_in_a_row} consecutive steps "
                f"(optim.max_skipped_steps = {self.config.optim.max_skipped_steps}). The last checkpoint is sound: resume "
                "from it with a lower optim.lr, or look for damaged samples in the steps before."
            )
