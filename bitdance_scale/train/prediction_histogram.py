"""The predictions of a trained diffusion head on held-out images, at fixed flow times (arXiv 2602.14041 Fig. 9)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.atomic_files import write_bytes, write_text
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.observe.prediction_histogram import (
    NEAR,
    NUM_COUNTS,
    PredictionHistogram,
    bin_edges,
    count_predictions,
    draw_histograms,
)
from bitdance_scale.parallel.agreement import all_ranks
from bitdance_scale.parallel.step import forward_only
from bitdance_scale.parallel.still_model import StageHolder
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.evaluation import Evaluator
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.still_run import load_still_run

logger = logging.getLogger(__name__)


def run_histogram(config: RunConfig, where: str, times: Sequence[float], out: Path) -> int:
    """Writes the histograms of a checkpoint's predictions as a picture, and as numbers beside it.

    Args:
        config: the run, checked; `evaluate` names the images, their noise and which weights predict.
        where: a checkpoint, a run folder or an import.
        times: flow times.
        out: PNG; the numbers go to the same name with `.json`.

    Returns:
        The exit code (`process.py`).

    Raises:
        BitDanceError: on all ranks, what the user can mend.
    """
    # There is no run folder for a log file.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with joined_ranks(config.parallel) as topology:
        checkpoint = find_checkpoint(where)
        run = load_still_run(config, checkpoint, config.evaluate.weights, topology)
        evaluator = Evaluator.read(config, run.condition, run.vision, topology)
        counts = collect_counts(run.model, evaluator.inputs(), times, topology)
        with all_ranks():
            if topology.rank == 0:
                pairs = zip(times, counts, strict=True)
                _write(config, checkpoint, [PredictionHistogram.of_counts(*pair) for pair in pairs], out)
    return EXIT_COMPLETE


@torch.no_grad()
def collect_counts(
    model: StageHolder, batch: Sequence[PackInputs], times: Sequence[float], topology: Topology
) -> np.ndarray:
    """Counts what the head predicts of all blocks at every flow time; a collective.

    The noise of a block is the same at every time. The times are draws of one forward pass, as those of training with
    `head.diff_batch_mul` are, so that the backbone runs once.

    Args:
        model: stages whose head is a `DiffusionHead`.
        batch: this replica's micro-batches; their own flow times are not used.
        times: K flow times.
        topology: the ranks.

    Returns:
        int64 [K, NUM_COUNTS] (`count_predictions`), the same on all ranks.
    """
    found: list[torch.Tensor] = []

    def count(_module: torch.nn.Module, _inputs: object, predicted_KBPC: torch.Tensor) -> None:
        found.append(torch.stack([count_predictions(part) for part in predicted_KBPC.chunk(len(times))]))

    total = torch.zeros(len(times), NUM_COUNTS, dtype=torch.int64, device=topology.device)
    last = model.stages[-1]
    hook = last.head.register_forward_hook(count) if last.is_last else None
    try:
        forward_only(model, [_at_times(inputs, times) for inputs in batch], topology)
    finally:
        if hook is not None:
            hook.remove()
    if last.is_last:
        # The last stage computes the micro-batches in their order.
        for inputs, counts in zip(batch, found, strict=True):
            if inputs.num_vision_targets:
                total += counts
    if topology.pipeline_size > 1:
        dist.broadcast(total, topology.last_stage_rank, group=topology.pipeline_group)
    dist.all_reduce(total, group=topology.data_group)
    return total.cpu().numpy()


def _at_times(inputs: PackInputs, times: Sequence[float]) -> PackInputs:
    """The same pack with one draw per flow time."""
    num_blocks = len(inputs.clean_bits)
    time = torch.tensor(times, dtype=torch.float32, device=inputs.time.device).repeat_interleave(num_blocks)
    noise = inputs.noise[:num_blocks].repeat(len(times), 1, 1)
    return replace(inputs, noise=noise, time=time, reports_blocks=False)


def _write(config: RunConfig, checkpoint: Path, histograms: Sequence[PredictionHistogram], out: Path) -> None:
    write_bytes(out, draw_histograms(histograms, f"{config.run.name}, {checkpoint.name}: predictions of the head"))
    record = {
        "checkpoint": str(checkpoint.resolve()),
        "weights": config.evaluate.weights,
        "images": config.evaluate.images,
        "seed": config.evaluate.seed,
        "near": NEAR,
        "bin_edges": bin_edges().tolist(),
        "times": [histogram.to_dict() for histogram in histograms],
    }
    numbers = out.with_suffix(".json")
    write_text(numbers, json.dumps(record, indent=2) + "\n")
    for histogram in histograms:
        logger.info("t = %g: %.1f%% of the predictions are near a bit", histogram.time, 100 * histogram.near_share)
    logger.info("written: %s and %s", out, numbers)
