"""Losses on held-out images while a run trains: the same images, noise and flow times every time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.config.data_schema import AugmentSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.flow import draw_time
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.observe.metrics import Evaluation
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.step import forward_only
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.sequence.noise import PackNoise, Purpose, pack_noise
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.train.shared_index import held_out_index_dir, labelled_index
from bitdance_scale.train.step_feed import StepReader
from bitdance_scale.vision.tokenizer import VisionTokenizer

logger = logging.getLogger(__name__)

# Losses are given for so many equal parts of the flow time.
NUM_TIME_PARTS = 5


class Evaluator:
    """The held-out images of a run, encoded. All ranks call it alike.

    Every image is a sample to draw, with its caption or class. Flow times are uniform (`Evaluation` says why). Which
    replica computes which images depends on the layout; no number drawn for an image does.

    Args:
        config: the run.
        packs: this replica's part of the images.
        topology: the ranks.
    """

    def __init__(self, config: RunConfig, packs: Sequence[Pack], topology: Topology) -> None:
        head = dataclasses.replace(config.head, time_schedule="uniform", time_shift=1.0)
        self._config, self._packs, self._topology = dataclasses.replace(config, head=head), packs, topology

    @classmethod
    def read(cls, config: RunConfig, condition: Condition, vision: VisionTokenizer, topology: Topology) -> Evaluator:
        """Reads and encodes the images that `[evaluate]` names; a collective.

        Raises:
            DataError: on every rank, what is wrong with the shards.
        """
        held_out = held_out_run(config)
        index = labelled_index(held_out)
        with StepReader(held_out, index, condition, vision, topology, None) as reader:
            if repeated := [use for use in reader.uses(1) if use.num_images > use.num_samples]:
                logger.info(
                    "held-out images are too few for evaluate.images=%d, and count several times: %s",
                    held_out.data.global_batch,
                    ", ".join(f"{use.num_images} of {use.num_samples} at {use.side_px} px" for use in repeated),
                )
            return cls(config, [loaded.pack for loaded in reader.next_step().packs], topology)

    def inputs(self) -> list[PackInputs]:
        """This replica's micro-batches, with the same noise and flow times at every call."""
        return self._inputs(self._noises())

    def evaluate(self, engine: TrainingEngine, step: int) -> Evaluation:
        """The losses of the model as it is after `step` steps; the same on all ranks."""
        config, topology = self._config, self._topology
        noises = self._noises()
        outputs = forward_only(engine, self._inputs(noises), topology)
        sides = [resolution.side_px for resolution in config.data.resolutions]
        # [class, part of the time, (sum of block losses, blocks)], and the same of the text in one more class.
        totals = torch.zeros(len(sides) + 1, NUM_TIME_PARTS, 2, dtype=torch.float64)
        if engine.stages[-1].is_last:
            for pack, noise, output in zip(self._packs, noises, outputs, strict=True):
                self._add_blocks(totals, pack, noise, output[2:].double().cpu())
                totals[-1, 0] += torch.tensor([float(output[1]), len(pack.text_positions)], dtype=torch.float64)
        totals = totals.to(topology.device)
        if topology.pipeline_size > 1:
            dist.broadcast(totals, topology.last_stage_rank, group=topology.pipeline_group)
        dist.all_reduce(totals, group=topology.data_group)
        totals = totals.cpu()
        blocks, text = totals[:-1], totals[-1, 0]
        return Evaluation(
            step=step,
            vision=_mean(blocks.sum(dim=(0, 1))),
            vision_by_resolution={side: _mean(part) for side, part in zip(sides, blocks.sum(dim=1), strict=True)},
            vision_by_time=tuple(_mean(part) for part in blocks.sum(dim=0)),
            text=_mean(text),
        )

    def _noises(self) -> list[PackNoise]:
        config = self._config
        return [
            pack_noise(pack, config.vision.num_bits, config.evaluate.seed, 0, Purpose.EVALUATE) for pack in self._packs
        ]

    def _inputs(self, noises: Sequence[PackNoise]) -> list[PackInputs]:
        return [
            make_inputs(pack, noise, self._config, self._topology.device, reports_blocks=True)
            for pack, noise in zip(self._packs, noises, strict=True)
        ]

    def _add_blocks(self, totals: torch.Tensor, pack: Pack, noise: PackNoise, losses: torch.Tensor) -> None:
        """Adds the losses of a pack's blocks where their class and their flow time are."""
        if len(pack.predict_positions) == 0:
            return
        times = draw_time(torch.from_numpy(noise.time_normal), self._config.head)
        parts = (times * NUM_TIME_PARTS).long().clamp(max=NUM_TIME_PARTS - 1)
        num_cells = pack.sample_grids[pack.sample_predicts].prod(axis=1)
        resolutions = np.repeat(self._resolution_of(num_cells), num_cells // pack.block_tokens)
        where = (torch.from_numpy(resolutions), parts)
        totals[..., 0].index_put_(where, losses, accumulate=True)
        totals[..., 1].index_put_(where, torch.ones_like(losses), accumulate=True)

    def _resolution_of(self, num_cells: np.ndarray) -> np.ndarray:
        """Number of the resolution of images of so many cells: that of the nearest area, by ratio."""
        downsample = self._config.vision.downsample
        areas = np.array([(resolution.side_px // downsample) ** 2 for resolution in self._config.data.resolutions])
        return np.abs(np.log(num_cells[:, None] / areas)).argmin(axis=1)


def held_out_run(config: RunConfig) -> RunConfig:
    """The run whose first step has the held-out images: each with its caption or class, and nothing is varied."""
    section = config.evaluate
    data = dataclasses.replace(
        config.data,
        shards=section.shards,
        sources=(),
        index_dir=held_out_index_dir(config.data.index_dir),
        global_batch=section.images,
        text_drop=0.0,
        image_to_text_share=0.0,
        augment=AugmentSection(),
        filters=(),
        bits_dir="",
    )
    return dataclasses.replace(config, data=data, run=dataclasses.replace(config.run, seed=section.seed))


def _mean(sum_and_count: torch.Tensor) -> float:
    total, count = sum_and_count.tolist()
    return total / count if count else float("nan")
