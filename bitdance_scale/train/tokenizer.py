"""Tokenizer training, data-parallel (arXiv 2602.14041 Sec. 3.1, 4.1): its steps, evaluation and export."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.checkpoint.run_checkpoint import load_tensors, read_state_of
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.data.crop_stream import CropStream
from bitdance_scale.data.held_out import centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import default_index_dir
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.observe.cost import memory_bytes, peak_flops, utilisation
from bitdance_scale.observe.metrics import append_evaluation
from bitdance_scale.observe.tokenizer_cost import tokenizer_flops
from bitdance_scale.parallel.agreement import all_ranks, first_rank_numbers, from_all_ranks, on_first_rank
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.phases import Phase, phase
from bitdance_scale.train.fault_verdict import LOSS, MicroReading, Sign
from bitdance_scale.train.job import Job, Schedule
from bitdance_scale.train.learning_rate import learning_rate
from bitdance_scale.train.run import run_job
from bitdance_scale.train.run_sinks import RunSinks
from bitdance_scale.train.shared_index import held_out_index_dir, image_index
from bitdance_scale.train.start_checks import check_resume
from bitdance_scale.train.step_faults import StepFaults, index_names
from bitdance_scale.train.step_guards import Spike
from bitdance_scale.train.tokenizer_evaluation import Reconstruction, evaluate, summary, to_pixels
from bitdance_scale.train.tokenizer_networks import AUTOENCODER, TokenizerNetworks
from bitdance_scale.train.tokenizer_objective import ADVERSARIAL, DISCRIMINATOR_LOSSES, LOSSES, Crops
from bitdance_scale.train.tokenizer_pictures import show_run
from bitdance_scale.train.tokenizer_records import (
    KINDS,
    TokenizerMetrics,
    TokenizerState,
    evaluation_record,
    size_name,
)
from bitdance_scale.train.tokenizer_start import DISCRIMINATOR, check_discriminator
from bitdance_scale.vision.autoencoder import published_config
from bitdance_scale.vision.weights import has_weights, save_weights

logger = logging.getLogger(__name__)

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
        data, held_out = config.data, config.evaluate.shards
        self._index = image_index(data.shards, data.index_dir, data.max_skipped_share, held_out)
        # The held-out images are read on rank 0 only, which evaluates alone.
        self._held_out: dict[tuple[int, int], np.ndarray] = {}
        with all_ranks():
            if topology.rank == 0:
                self._held_out = _held_out_images(config)
        self._networks = TokenizerNetworks(config, topology.device)
        self._state = TokenizerState(step=0, data_digest=self._data_digest())
        self._results: dict[tuple[int, int], Reconstruction] = {}
        latest = self.newest_checkpoint()
        if latest is not None:
            self.load_newest(latest, self._resume)
        elif config.run.start_from:
            self._networks.start_from(config.run.start_from)
        self._sinks: RunSinks | None = None
        self._faults = StepFaults(topology, run_folder, (0,), index_names(self._index))
        self._stream: CropStream | None = None
        self._crops: Iterator[np.ndarray] = iter(())
        self._images = np.empty((0, 0, 0, 3), dtype=np.uint8)
        # Images that could not be read: before this process, and since.
        self._skipped_before, self._num_skipped = self._state.skipped_samples, 0
        self._peak = peak_flops(topology.device_name, config.run.dtype)
        self._begun_s, self._num_steps, self._num_images = time.monotonic(), 0, 0
        self._wait_s, self._flops = 0.0, 0

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
        assert self._stream is not None, "steps are taken within a session"
        begun_s, counter = time.monotonic(), self._stream.error_counter
        totals = [0, 0]
        with all_ranks(sums=totals), phase(Phase.READING):
            self._images = next(self._crops)
            totals[:] = counter.totals
        counter.check(totals, from_all_ranks)
        self._num_skipped = totals[1]
        self._wait_s += time.monotonic() - begun_s

    def take_step(self) -> bool:
        """Trains on the crops that were read."""
        config, networks = self.config, self._networks
        self._lr = learning_rate(config.optim, self.step, config.run.steps)
        crops = self._step_crops()
        with phase(Phase.FORWARD):
            outputs = networks.reconstruct(crops, self.step)
        with phase(Phase.BACKWARD):
            self._losses = networks.backward(crops, outputs, self.step)
        with phase(Phase.OPTIMISER):
            # Gradients are summed over the ranks, so all ranks see the same norms.
            self._grad_norms = networks.clip(config.optim.clip_norm)
            is_finite = all(math.isfinite(norm) for norm in self._grad_norms.values())
            spike = self._judge() if is_finite and self.guards.judges_spikes else None
            is_skipped = not is_finite or (spike is not None and self.guards.refuses_spikes)
            if not is_skipped:
                networks.step(self._lr)
        if not is_finite or spike is not None:
            with phase(Phase.LOGGING):
                self._explain(spike)
        self._count(is_skipped=not is_finite)
        return is_skipped

    @property
    def _num_images_of_step(self) -> int:
        """Images of the step that was read, over all ranks."""
        return self.config.data.images_px // math.prod(self._images.shape[1:3])

    def _step_crops(self) -> Crops:
        assert self._stream is not None, "steps are taken within a session"
        return Crops(
            to_pixels(self._images, self.topology.device), self._stream.slots, num_images=self._num_images_of_step
        )

    def _judge(self) -> Spike | None:
        """Judges the numbers of a step, the same ones on all ranks."""
        loss = self._summed(["total"])["total"]
        return self.guards.judge(*first_rank_numbers(loss, self._grad_norms[AUTOENCODER]))

    def _summed(self, names: Sequence[str]) -> dict[str, float]:
        """Losses of the global batch; a collective."""
        parts = torch.stack([self._losses[name].detach().double() for name in names])
        dist.all_reduce(parts)
        return dict(zip(names, parts.tolist(), strict=True))

    def _explain(self, spike: Spike | None) -> None:
        """Says where a gradient that is not finite came from, or a spike."""
        again: dict[str, torch.Tensor] = {}
        if spike is None:
            broken = [name for name, norm in self._grad_norms.items() if not math.isfinite(norm)]
            logger.warning("step %d: the gradient of the %s is not finite", self.step + 1, " and the ".join(broken))
            again = self._networks.again(self._step_crops(), self.step)
        names = (*OWN_LOSSES, *(name for name in (ADVERSARIAL, *DISCRIMINATOR_LOSSES) if name in self._losses))
        signs = [Sign(LOSS, 0, self._losses[name].item(), again[name].item() if again else None) for name in names]
        assert self._stream is not None, "steps are taken within a session"
        reading = MicroReading(0, self._stream.samples, tuple(signs), loss=self._losses["total"].item())
        if spike is None:
            self._faults.explain_non_finite(self.step + 1, [reading])
        else:
            self._faults.explain_spike(self.step + 1, spike, self.guards.refuses_spikes, [reading])

    def log(self) -> None:
        """Writes the metrics of the steps since the last call."""
        device = self.topology.device
        parts = self._summed([name for name in ("total", *LOSSES, *DISCRIMINATOR_LOSSES) if name in self._losses])
        loss = parts.pop("total")
        highest = torch.tensor([self._wait_s, memory_bytes(device)], dtype=torch.float64, device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        wait_s, memory = highest.tolist()
        elapsed_s = time.monotonic() - self._begun_s
        state, num_steps = self._state, self._num_steps
        metrics = TokenizerMetrics(
            state.step,
            images=state.images,
            loss=loss,
            **parts,
            grad_norm=self._grad_norms[AUTOENCODER],
            discriminator_grad_norm=self._grad_norms.get(DISCRIMINATOR, 0.0),
            lr=self._lr,
            step_s=elapsed_s / num_steps,
            data_wait_s=wait_s / num_steps,
            images_per_s=self._num_images / elapsed_s,
            mfu=utilisation(self._flops, elapsed_s, self.topology.world_size, self._peak),
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
                {name: value for name, value in parts.items() if value},
                grad_norm=metrics.grad_norm,
                images_per_s=metrics.images_per_s,
                step_s=metrics.step_s,
            )
        self._restart()

    def evaluate(self) -> None:
        """Reconstructs the held-out images on rank 0 and writes how well."""
        self._results = self._reconstruct(self.config.evaluate.weights)
        with self.local_errors.kept():
            has_all = self._results.keys() == self._held_out.keys()
            if self._sinks is not None and self.topology.rank == 0 and has_all:
                self._sinks.write_evaluation(evaluation_record(self.step, self._results), self._state.images)
                sizes = "  ".join(
                    f"{size_name(size)} px {result.psnr_db:.2f}" for size, result in self._results.items()
                )
                logger.info("held out after step %d: PSNR in dB  %s", self.step, sizes)
                show_run(self.run_folder, self.step, self._held_out, self._results, self._sinks)

    def draw(self) -> None:
        """Nothing: the evaluation says how well images are reconstructed."""

    def pause(self) -> None:
        """Leaves out of the speeds what happened since the last step."""
        if self._num_steps == 0:
            self._begun_s = time.monotonic()

    def state(self) -> TokenizerState:
        """How far the run is."""
        return dataclasses.replace(
            self._state, guards=self.guards.state(), discriminator_updates=self._networks.discriminator_updates
        )

    def model_values(self) -> Mapping[str, ShardedValue]:
        """The networks' parameters, whole on every rank."""
        return self._networks.model_values()

    def optimizer_values(self) -> Mapping[str, ShardedValue]:
        """Adam's moments and the averages of what this rank steps."""
        return self._networks.optimizer_values()

    def finish(self) -> None:
        """Writes the weights as a published tokenizer, and says how well they reconstruct."""
        kind, output = self._output_weights, self.config.run.output
        results = self._results if kind == self.config.evaluate.weights else self._reconstruct(kind)
        weights = self._output()
        with all_ranks():
            if self.topology.rank == 0:
                save_weights(output, **weights)
                logger.info("%s weights of step %d: %s\n%s", kind, self.step, output, summary(results))

    def complete(self) -> None:
        """Writes the weights where `run.output` does not hold those of this step, after the evaluation before them."""
        if self._has_output():
            return
        self._results = self._reconstruct(self.config.evaluate.weights)
        self.local_errors.raise_on_all_ranks()
        with all_ranks():
            if self.topology.rank == 0:
                append_evaluation(self.run_folder, evaluation_record(self.step, self._results))
        self.finish()

    def _has_output(self) -> bool:
        """Whether `run.output` holds the weights of this step; a collective."""
        weights = self._output()
        return on_first_rank(lambda: has_weights(self.config.run.output, **weights))

    def _output(self) -> dict[str, Any]:
        """What `save_weights` writes, with the tensors on the CPU of rank 0, and none elsewhere; a collective.

        Nothing is written while the averages are in the place of the weights, where no rank may fail alone.

        Raises:
            Exception: on all ranks, what one has kept.
        """
        dtype = getattr(torch, self.config.run.output_dtype)
        state: dict[str, torch.Tensor] = {}
        with self._networks.weights_of(self._output_weights), self.local_errors.kept():
            if self.topology.rank == 0:
                tensors = self._networks.autoencoder.state_dict()
                state = {name: tensor.to("cpu", dtype, copy=True) for name, tensor in tensors.items()}
        self.local_errors.raise_on_all_ranks()
        sizes = published_config(**asdict(self.config.autoencoder))
        return {"state": state, "published_config": sizes, "dtype": dtype}

    @property
    def _output_weights(self) -> str:
        kind = self.config.run.output_weights
        if kind != "auto":
            return kind
        return "averaged" if self.config.optim.average_decay else "trained"

    def _reconstruct(self, kind: str) -> dict[tuple[int, int], Reconstruction]:
        """How well the held-out images are reconstructed by (height, width), on rank 0; a collective."""
        num_groups, device = self.config.num_groups, self.topology.device
        results: dict[tuple[int, int], Reconstruction] = {}
        with self._networks.weights_of(kind), self.local_errors.kept():
            for size, images in self._held_out.items():
                results[size] = evaluate(self._networks.autoencoder, images, num_groups, device)
        return results

    def _restart(self) -> None:
        """Begins a new interval between logged steps."""
        self._begun_s, self._num_steps, self._num_images = time.monotonic(), 0, 0
        self._wait_s, self._flops = 0.0, 0

    def _count(self, is_skipped: bool) -> None:
        num_images, state = self._num_images_of_step, self._state
        self._state = dataclasses.replace(
            state,
            step=state.step + 1,
            images=state.images + num_images,
            skipped_samples=self._skipped_before + self._num_skipped,
            skipped_steps=state.skipped_steps + int(is_skipped),
        )
        self._num_steps += 1
        self._num_images += num_images
        height, width = self._images.shape[1:3]
        flops = tokenizer_flops(self.config, (height, width))
        is_judged = DISCRIMINATOR in self._grad_norms
        self._flops += num_images * (flops.training if is_judged else flops.training - flops.adversarial)

    def _data_digest(self) -> str:
        data = self.config.data
        decisive = [self.config.run.seed, self._index.hash, data.sizes_px, data.images_px, data.max_zoom]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

    def _resume(self, path: Path) -> None:
        state = on_first_rank(lambda: read_state_of(path, TokenizerState), other=CheckpointError)
        told = on_first_rank(lambda: check_resume(path, self.config))
        on_first_rank(lambda: check_discriminator(path, self.config), other=CheckpointError)
        if state.data_digest != self._state.data_digest:
            raise ConfigError(
                f"run.name = {self.config.run.name!r}: {path} was trained with other data.shards, data.sizes_px, "
                "data.images_px, data.max_zoom or run.seed: the data order would not go on. Restore them, or give the "
                "run another name."
            )
        load_tensors(path, self.model_values(), self.optimizer_values())
        # Not before: where the tensors are damaged, an older checkpoint is loaded in this one's place.
        self.restore_guards(state.guards, told)
        self._networks.restore(
            state.step - state.skipped_steps - self.guards.num_refused_steps, state.discriminator_updates
        )
        self._state, self._saved_step = state, state.step


def _held_out_images(config: TokenizerConfig) -> dict[tuple[int, int], np.ndarray]:
    """uint8 [n, H, W, 3] by (height, width)."""
    section = config.evaluate
    shards = expand_shards(section.shards, "evaluate.shards")
    index = build_index(shards, held_out_index_dir(config.data.index_dir) or default_index_dir(shards))
    return {size: centre_crops(index, size, section.num_images) for size in section.sizes_px}
