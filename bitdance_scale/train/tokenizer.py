"""Tokenizer training, data-parallel (arXiv 2602.14041 Sec. 3.1, 4.1): its steps, evaluation and export."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bitdance_scale.checkpoint.run_checkpoint import load_tensors, read_state_of
from bitdance_scale.config.schema import ParallelSection
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.data.crop_stream import CropStream, centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import default_index_dir
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.observe.cost import memory_bytes
from bitdance_scale.observe.metrics import append_evaluation
from bitdance_scale.parallel.agreement import all_ranks, first_rank_numbers, on_first_rank
from bitdance_scale.parallel.averaged_weights import AveragedWeights
from bitdance_scale.parallel.partition import Piece, ShardedValue
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, phase
from bitdance_scale.train.fault_verdict import LOSS, MicroReading, Sign
from bitdance_scale.train.job import Job, Schedule
from bitdance_scale.train.learning_rate import learning_rate
from bitdance_scale.train.run import run_job
from bitdance_scale.train.run_sinks import RunSinks
from bitdance_scale.train.shared_index import image_index
from bitdance_scale.train.start_checks import check_resume
from bitdance_scale.train.step_faults import StepFaults, index_names
from bitdance_scale.train.step_guards import Spike
from bitdance_scale.train.tokenizer_evaluation import Reconstruction, evaluate, summary, to_pixels
from bitdance_scale.train.tokenizer_objective import TokenizerObjective
from bitdance_scale.train.tokenizer_records import (
    KINDS,
    LOSSES,
    TokenizerMetrics,
    TokenizerState,
    evaluation_record,
    size_name,
)
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.weights import WEIGHTS_NAME, save_weights

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
OWN_LOSSES = ("l1", "commit")
"""Losses of a rank's own images; the entropy, and with it the total, is over all ranks."""


def run_tokenizer(config: TokenizerConfig) -> int:
    """Trains the tokenizer in this process, one rank of a torchrun job or a job of one process.

    Args:
        config: the run, checked.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    return run_job(config, ParallelSection(), lambda topology, folder: TokenizerJob(config, topology, folder))


class TokenizerJob(Job):
    """A tokenizer run on this rank. Every rank has the whole network and its part of each step's crops.

    Args:
        config: the run, checked.
        topology: the ranks, all of them data-parallel.
        run_folder: `<run.root>/<run.name>`.

    Raises:
        BitDanceError: on every rank, what is wrong with files or data, before any step.
    """

    def __init__(self, config: TokenizerConfig, topology: Topology, run_folder: Path) -> None:
        super().__init__(config, topology, run_folder)
        self.config = config
        self._index = image_index(config.data.shards, config.data.index_dir, config.data.max_skipped_share)
        # The held-out images are read on rank 0 only, which evaluates alone.
        self._held_out: dict[tuple[int, int], np.ndarray] = {}
        with all_ranks():
            if topology.rank == 0:
                self._held_out = _held_out_images(config)
        torch.manual_seed(config.run.seed)
        self._autoencoder = Autoencoder(**asdict(config.autoencoder)).to(topology.device)
        self._objective: torch.nn.Module = TokenizerObjective(self._autoencoder, config)
        if topology.world_size > 1:
            self._objective = DistributedDataParallel(self._objective)
        self._optimiser = torch.optim.Adam(
            self._autoencoder.parameters(), lr=0.0, betas=(config.optim.beta1, config.optim.beta2)
        )
        # The weights are float32 themselves, and whole on every rank, and so is the average.
        decay = config.optim.average_decay
        self._averages = AveragedWeights([*self._autoencoder.parameters()], decay) if decay else None
        self._state = TokenizerState(step=0, data_digest=self._data_digest())
        self._results: dict[tuple[int, int], Reconstruction] = {}
        latest = self.newest_checkpoint()
        if latest is not None:
            self.load_newest(latest, self._resume)
        self._sinks: RunSinks | None = None
        self._faults = StepFaults(topology, run_folder, (0,), index_names(self._index))
        self._stream: CropStream | None = None
        self._crops: Iterator[np.ndarray] = iter(())
        self._images = np.empty((0, 0, 0, 3), dtype=np.uint8)
        self._begun_s, self._num_steps, self._num_images, self._wait_s = time.monotonic(), 0, 0, 0.0

    @property
    def step(self) -> int:
        """Optimiser steps taken, skipped ones included."""
        return self._state.step

    @property
    def schedule(self) -> Schedule:
        """What is due when."""
        config = self.config
        return Schedule(
            num_steps=config.run.steps,
            log=config.observe.log_every_steps,
            save=config.checkpoint.every_steps,
            evaluate=config.evaluate.every_steps,
            draw=0,
        )

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Opens the stream of crops and the sinks."""
        config, topology = self.config, self.topology
        stream = CropStream(
            self._index,
            sizes_px=config.data.sizes_px,
            images_px=config.data.images_px,
            max_zoom=config.data.max_zoom,
            seed=config.run.seed,
            rank=topology.data_rank,
            num_ranks=topology.data_size,
            num_steps=config.run.steps,
            num_threads=config.data.read_threads,
            max_skipped_share=config.data.max_skipped_share,
            first_step=self.step,
        )
        sinks = RunSinks(
            is_active=topology.rank == 0,
            section=config.observe,
            config=config,
            run_folder=self.run_folder,
            num_steps=config.run.steps,
            resumed_step=self.step,
            kinds=KINDS,
        )
        with sinks as self._sinks, stream:
            self._stream, self._crops = stream, iter(stream)
            self.write_config()
            self._restart()
            yield

    def read(self) -> None:
        """Takes the crops of the next step."""
        begun_s = time.monotonic()
        with all_ranks(), phase(Phase.READING):
            self._images = next(self._crops)
        self._wait_s += time.monotonic() - begun_s

    def take_step(self) -> bool:
        """Trains on the crops that were read."""
        config = self.config
        self._lr = learning_rate(config.optim, self.step, config.run.steps)
        for group in self._optimiser.param_groups:
            group["lr"] = self._lr
        with phase(Phase.FORWARD):
            self._losses = self._compute_losses()
        self._optimiser.zero_grad(set_to_none=True)
        with phase(Phase.BACKWARD):
            self._losses["total"].backward()
        with phase(Phase.OPTIMISER):
            parameters = self._autoencoder.parameters()
            self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
            # Gradients are averaged over the ranks, so all ranks see the same norm.
            is_finite = bool(torch.isfinite(self._grad_norm))
            spike = self._judge() if is_finite and self.guards.judges_spikes else None
            is_skipped = not is_finite or (spike is not None and self.guards.refuses_spikes)
            if not is_skipped:
                self._optimiser.step()
                if self._averages is not None:
                    self._averages.update()
        if not is_finite or spike is not None:
            with phase(Phase.LOGGING):
                self._explain(spike)
        self._count(is_skipped=not is_finite)
        return is_skipped

    def _compute_losses(self) -> dict[str, torch.Tensor]:
        """The losses of the crops that were read, the same whenever they are computed within the step."""
        losses: dict[str, torch.Tensor] = self._objective(to_pixels(self._images, self.topology.device), self._flips())
        return losses

    def _judge(self) -> Spike | None:
        """Judges the numbers of a step, the same ones on all ranks."""
        loss = self._losses["total"].detach().double()
        dist.all_reduce(loss)
        return self.guards.judge(*first_rank_numbers(loss.item() / self.topology.world_size, self._grad_norm.item()))

    def _explain(self, spike: Spike | None) -> None:
        """Says where a gradient that is not finite came from, or a spike."""
        again: dict[str, torch.Tensor] = {}
        if spike is None:
            with torch.no_grad():
                again = self._compute_losses()
        signs = [Sign(LOSS, 0, self._losses[name].item(), again[name].item() if again else None) for name in OWN_LOSSES]
        assert self._stream is not None, "steps are taken within a session"
        reading = MicroReading(0, self._stream.samples, tuple(signs), loss=self._losses["total"].item())
        if spike is None:
            self._faults.explain_non_finite(self.step + 1, [reading])
        else:
            self._faults.explain_spike(self.step + 1, spike, self.guards.refuses_spikes, [reading])

    def log(self) -> None:
        """Writes the metrics of the steps since the last call."""
        device = self.topology.device
        means = torch.stack([self._losses[name].detach().double() for name in ("total", *LOSSES)])
        dist.all_reduce(means)
        loss, *parts = (means / self.topology.world_size).tolist()
        highest = torch.tensor([self._wait_s, memory_bytes(device)], dtype=torch.float64, device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        wait_s, memory = highest.tolist()
        elapsed_s = time.monotonic() - self._begun_s
        state, num_steps = self._state, self._num_steps
        metrics = TokenizerMetrics(
            state.step,
            images=state.images,
            loss=loss,
            **dict(zip(LOSSES, parts, strict=True)),
            grad_norm=self._grad_norm.item(),
            lr=self._lr,
            step_s=elapsed_s / num_steps,
            data_wait_s=wait_s / num_steps,
            images_per_s=self._num_images / elapsed_s,
            memory_bytes=int(memory),
            skipped_samples=state.skipped_samples,
            skipped_steps=state.skipped_steps,
            spikes=self.guards.num_spikes,
        )
        assert self._sinks is not None, "steps are taken within a session"
        with self.local_errors.kept():
            self._sinks.write_step(
                metrics,
                metrics.loss,
                {name: getattr(metrics, name) for name in LOSSES},
                grad_norm=metrics.grad_norm,
                images_per_s=metrics.images_per_s,
                step_s=metrics.step_s,
            )
        self._restart()

    def evaluate(self) -> None:
        """Reconstructs the held-out images on rank 0 and writes how well."""
        # On rank 0 only.
        with self.local_errors.kept():
            self._results = self._reconstruct(self.config.evaluate.weights)
            if self._sinks is not None and self.topology.rank == 0:
                self._sinks.write_evaluation(evaluation_record(self.step, self._results), self._state.images)
                sizes = "  ".join(
                    f"{size_name(size)} px {result.psnr_db:.2f}" for size, result in self._results.items()
                )
                logger.info("held out after step %d: PSNR in dB  %s", self.step, sizes)

    def draw(self) -> None:
        """Nothing: the evaluation says how well images are reconstructed."""

    def pause(self) -> None:
        """Leaves out of the speeds what happened since the last step."""
        if self._num_steps == 0:
            self._begun_s = time.monotonic()

    def state(self) -> TokenizerState:
        """How far the run is."""
        return dataclasses.replace(self._state, guards=self.guards.state())

    def model_values(self) -> Mapping[str, ShardedValue]:
        """The network's parameters, whole on every rank."""
        return {name: _whole(parameter.data) for name, parameter in self._autoencoder.named_parameters()}

    def optimizer_values(self) -> Mapping[str, ShardedValue]:
        """Adam's moments and the averages, whole on every rank; moments are made here if no step was taken yet."""
        values: dict[str, ShardedValue] = {}
        for name, parameter in self._autoencoder.named_parameters():
            if self._averages is not None:
                values[f"average.{name}"] = _whole(self._averages.of(parameter))
            state = self._optimiser.state[parameter]
            if not state:
                state |= {"step": torch.zeros(())} | {kind: torch.zeros_like(parameter) for kind in MOMENTS}
            values |= {f"{kind}.{name}": _whole(state[kind]) for kind in MOMENTS}
        return values

    def finish(self) -> None:
        """Writes the weights as a published tokenizer, and says how well they reconstruct."""
        if self.topology.rank == 0:
            kind, output = self._output_weights, self.config.run.output
            results = self._results if kind == self.config.evaluate.weights else self._reconstruct(kind)
            with self._weights_of(kind):
                sizes = published_config(**asdict(self.config.autoencoder))
                save_weights(output, self._autoencoder.state_dict(), sizes)
            logger.info("%s weights of step %d: %s\n%s", kind, self.step, output, summary(results))

    def complete(self) -> None:
        """Writes the weights where they are missing, and the evaluation that comes before them."""
        weights = Path(self.config.run.output) / WEIGHTS_NAME
        if not on_first_rank(weights.is_file):
            self._results = self._reconstruct(self.config.evaluate.weights)
            with all_ranks():
                if self.topology.rank == 0:
                    append_evaluation(self.run_folder, evaluation_record(self.step, self._results))
                self.finish()

    @property
    def _output_weights(self) -> str:
        kind = self.config.run.output_weights
        if kind != "auto":
            return kind
        return "trained" if self._averages is None else "averaged"

    def _weights_of(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """Within it the network of this rank has its `trained` or its `averaged` weights."""
        if kind == "trained":
            return contextlib.nullcontext()
        assert self._averages is not None, "`evaluate.weights` and `run.output_weights` need `optim.average_decay`"
        # The averages are in the place of the weights themselves: nothing is to be refreshed.
        return self._averages.in_place_of_masters(lambda: None)

    def _reconstruct(self, kind: str) -> dict[tuple[int, int], Reconstruction]:
        """How well the held-out images are reconstructed by (height, width); empty where they were not read."""
        num_groups, device = self.config.quantiser.num_groups, self.topology.device
        with self._weights_of(kind):
            return {
                size: evaluate(self._autoencoder, images, num_groups, device) for size, images in self._held_out.items()
            }

    def _restart(self) -> None:
        """Begins a new interval between logged steps."""
        self._begun_s, self._num_steps, self._num_images, self._wait_s = time.monotonic(), 0, 0, 0.0

    def _count(self, is_skipped: bool) -> None:
        num_planned = self.config.data.images_px // math.prod(self._images.shape[1:3])
        num_read = torch.tensor(len(self._images), device=self.topology.device)
        dist.all_reduce(num_read)
        num_images, state = int(num_read.item()), self._state
        self._state = dataclasses.replace(
            state,
            step=state.step + 1,
            images=state.images + num_images,
            skipped_samples=state.skipped_samples + num_planned - num_images,
            skipped_steps=state.skipped_steps + int(is_skipped),
        )
        self._num_steps += 1
        self._num_images += num_images

    def _flips(self) -> torch.Generator:
        """The generator of this rank's bit flips in this step; seed, step and rank decide, so that a run resumes."""
        sequence = np.random.SeedSequence([self.config.run.seed, self.step, self.topology.rank])
        seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(device=self.topology.device).manual_seed(seed)

    def _data_digest(self) -> str:
        data = self.config.data
        decisive = [self.config.run.seed, self._index.hash, data.sizes_px, data.images_px, data.max_zoom]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

    def _resume(self, path: Path) -> None:
        state = on_first_rank(lambda: read_state_of(path, TokenizerState), other=CheckpointError)
        on_first_rank(lambda: check_resume(path, self.config))
        if state.data_digest != self._state.data_digest:
            raise ConfigError(
                f"run.name = {self.config.run.name!r}: {path} was trained with other data.shards, data.sizes_px, "
                "data.images_px, data.max_zoom or run.seed: the data order would not go on. Restore them, or give the "
                "run another name."
            )
        self.guards.restore(state.guards)
        load_tensors(path, self.model_values(), self.optimizer_values())
        for adam in self._optimiser.state.values():
            adam["step"].fill_(state.step - state.skipped_steps - self.guards.num_refused_steps)
        self._state, self._saved_step = state, state.step


def _whole(tensor: torch.Tensor) -> ShardedValue:
    return ShardedValue(tuple(tensor.shape), tensor.dtype, (Piece((0,) * tensor.dim(), tensor),))


def _held_out_images(config: TokenizerConfig) -> dict[tuple[int, int], np.ndarray]:
    """uint8 [n, H, W, 3] by (height, width)."""
    section = config.evaluate
    shards = expand_shards(section.shards)
    shared = set(shards) & set(expand_shards(config.data.shards))
    if shared:
        raise ConfigError(f"evaluate.shards: {sorted(shared)[0]} is in data.shards as well; hold other shards out")
    index = build_index(shards, default_index_dir(shards))
    return {size: centre_crops(index, size, section.num_images) for size in section.sizes_px}
