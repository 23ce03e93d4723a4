"""What a text-to-image run has done so far, and the metrics of its logged steps."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.data_errors import ErrorCause
from bitdance_scale.observe.cost import PackCounts, count_pack, memory_bytes, peak_flops, step_flops, utilisation
from bitdance_scale.observe.metrics import StepMetrics
from bitdance_scale.parallel.engine import StepOutcome
from bitdance_scale.parallel.step import StepLosses
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.step_feed import ReadyStep
from bitdance_scale.train.straggler import StragglerWatch


@dataclass
class Progress:
    """Counts since the start of the run; they survive a resume.

    Attributes:
        step: optimiser steps taken, those of `skipped_steps` included.
        images: images trained on, skipped samples left out.
        tokens: positions seen, padding left out.
        images_by_resolution: resolution (`side_px`) -> images planned.
        skipped_samples: samples that could not be used.
        sample_errors: cause (`data_errors.ErrorCause`) -> samples with it, those trained without their caption too.
        skipped_steps: steps that changed nothing, because a gradient was not finite.
    """

    step: int = 0
    images: int = 0
    tokens: int = 0
    images_by_resolution: dict[int, int] = field(default_factory=dict)
    skipped_samples: int = 0
    sample_errors: dict[str, int] = field(default_factory=dict)
    skipped_steps: int = 0


class StepMeter:
    """Adds up steps and makes the metrics of a logged one; all ranks call it alike.

    Args:
        config: the run.
        vocab_size: entries of the tokenizer.
        topology: the ranks.
        progress: counted on in place.

    Attributes:
        stragglers: compares the ranks; measures while it listens.
    """

    def __init__(self, config: RunConfig, vocab_size: int, topology: Topology, progress: Progress) -> None:
        self._config, self._vocab_size, self._topology = config, vocab_size, topology
        self.progress = progress
        self.stragglers = StragglerWatch(topology)
        self._peak = peak_flops(topology.device_name, config.run.dtype)
        # No count of ours: the plan knows it of any step.
        self._images_by_source: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """Begins a new interval between logged steps."""
        self._begun_s, self._num_steps, self._wait_s = time.monotonic(), 0, 0.0
        self._images, self._positions, self._padding, self._flops = 0, 0, 0, 0.0
        self._num_ready = 0

    def add(self, ready: ReadyStep, is_skipped: bool) -> None:
        """Counts one step that was trained; one small sum over the replicas."""
        loaded = ready.loaded
        counts = sum((count_pack(loaded_pack.pack) for loaded_pack in loaded.packs), PackCounts())
        num_padding = sum(loaded_pack.pack.num_padding for loaded_pack in loaded.packs)
        flops = step_flops(self._config, self._vocab_size, counts).training
        sample_errors = [loaded.sample_errors[cause] for cause in ErrorCause]
        totals = torch.tensor(
            [counts.num_positions, num_padding, flops, loaded.num_skipped, *sample_errors],
            dtype=torch.float64,
            device=self._topology.device,
        )
        dist.all_reduce(totals, group=self._topology.data_group)
        positions, padding, total_flops, num_left_out, *sample_errors = totals.tolist()
        by_cause = {cause: int(count) for cause, count in zip(ErrorCause, sample_errors, strict=True) if count}
        # Not those of `by_cause`: samples that streams have lost were never planned.
        num_trained = sum(loaded.images_by_resolution.values()) - int(num_left_out)
        progress = self.progress
        progress.step += 1
        progress.images += num_trained
        progress.tokens += int(positions)
        progress.skipped_samples += sum(count for cause, count in by_cause.items() if cause.is_skipped)
        for cause, count in by_cause.items():
            progress.sample_errors[str(cause)] = progress.sample_errors.get(str(cause), 0) + count
        progress.skipped_steps += int(is_skipped)
        for side_px, count in loaded.images_by_resolution.items():
            progress.images_by_resolution[side_px] = progress.images_by_resolution.get(side_px, 0) + count
        self._images_by_source = loaded.images_by_source
        self.stragglers.add(flops)
        self._num_steps += 1
        self._wait_s += ready.wait_s
        self._images += num_trained
        self._num_ready = loaded.num_ready
        self._positions += int(positions)
        self._padding += int(padding)
        self._flops += total_flops

    def metrics(self, losses: StepLosses, outcome: StepOutcome, lr: float, num_spikes: int) -> StepMetrics:
        """The metrics of the last step, speeds averaged since the previous logged one; three small collectives.

        Args:
            losses: of the step.
            outcome: of the step.
            lr: learning rate of the step.
            num_spikes: `StepGuards.num_spikes`.
        """
        highest = torch.tensor(
            [self._wait_s, memory_bytes(self._topology.device), -self._num_ready],
            dtype=torch.float64,
            device=self._topology.device,
        )
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        wait_s, memory, lacking = highest.tolist()
        elapsed_s = time.monotonic() - self._begun_s
        progress = self.progress
        slowest = self.stragglers.report(progress.step)
        step_s = elapsed_s / self._num_steps
        mean_flops = self._flops / self._num_steps
        metrics = StepMetrics(
            step=progress.step,
            images=progress.images,
            tokens=progress.tokens,
            loss=losses.total,
            loss_vision=losses.vision,
            loss_text=losses.text,
            grad_norm=outcome.grad_norm,
            lr=lr,
            step_s=step_s,
            data_wait_s=wait_s / self._num_steps,
            tokens_per_s=self._positions / elapsed_s,
            images_per_s=self._images / elapsed_s,
            mfu=utilisation(mean_flops, step_s, self._topology.world_size, self._peak),
            images_by_resolution=dict(progress.images_by_resolution),
            padding_share=self._padding / max(1, self._padding + self._positions),
            memory_bytes=int(memory),
            skipped_samples=progress.skipped_samples,
            sample_errors=dict(progress.sample_errors),
            steps_ready=int(-lacking),
            skipped_steps=progress.skipped_steps,
            images_by_source=dict(self._images_by_source),
            spikes=num_spikes,
            slowest_rank=slowest.rank,
            slowest_excess=slowest.excess,
        )
        self.restart()
        return metrics

    def pause(self) -> None:
        """Leaves out of the speeds what happened since the last logged step (a checkpoint, a sample grid)."""
        if self._num_steps == 0:
            self._begun_s = time.monotonic()


def progress_fields(progress: Progress) -> dict[str, Any]:
    """The counts as JSON values, for a checkpoint's `TrainState`."""
    values = dataclasses.asdict(progress)
    skipped = values.pop("skipped_steps")
    values["images_by_resolution"] = {str(side_px): count for side_px, count in progress.images_by_resolution.items()}
    return values | {"optimizer": {"skipped_steps": skipped}}
