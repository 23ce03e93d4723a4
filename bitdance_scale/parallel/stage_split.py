"""How many backbone layers each pipeline stage gets, so that the slowest stage takes as little time as possible.

The first stage also holds the projector, the last one the diffusion head and the text projection. The head alone costs
as much as about five layers of the 14B backbone, so under an even split the other stages wait for the last one. Costs
are FLOPs of an average image of the run's own mix of resolutions (`observe/cost.py`). Text embedding is a table
look-up and costs none.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.synthetic_packs import placeholder_sample, placeholder_tokens
from bitdance_scale.observe.cost import TRAINING_OVER_FORWARD, PackCounts, count_pack, encode_flops, step_flops
from bitdance_scale.sequence.layout import pack_samples

# Tokens of a caption, which no setting gives: alternative texts have about 20, written descriptions 60 to 150. At the
# PT mix every 15 of them make a layer of the 14B model 1 % more expensive, so the split hardly depends on the number.
TYPICAL_CAPTION_TOKENS = 64


@dataclass(frozen=True)
class StageCosts:
    """FLOPs of training on one average image.

    Attributes:
        layer: one backbone layer.
        first: what only the first stage does (projector).
        last: what only the last stage does (head, text projection).
        encoder: one rank's part of the frozen autoencoder. The images of a step are divided among the ranks of the
            replica and encoded before the pipeline starts. The cost is therefore the same on every rank and does not
            change the split.
    """

    layer: float
    first: float
    last: float
    encoder: float

    def of_stages(self, split: tuple[int, ...]) -> list[float]:
        """FLOPs of every stage under a split, without the encoder."""
        costs = [count * self.layer for count in split]
        costs[0] += self.first
        costs[-1] += self.last
        return costs

    def of_ranks(self, split: tuple[int, ...], num_ranks: int) -> list[float]:
        """FLOPs of every pipeline rank, its part of the encoder included; stage k is on rank k modulo `num_ranks`."""
        costs = self.of_stages(split)
        return [self.encoder + sum(costs[rank::num_ranks]) for rank in range(num_ranks)]


def stage_split(config: RunConfig, vocab_size: int) -> tuple[int, ...]:
    """Backbone layers of every stage, as `parallel.pipeline_split` says; their sum is `model.num_layers`.

    Args:
        config: the run.
        vocab_size: entries of the tokenizer; the cost of the text projection depends on it.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    if not isinstance(parallel.pipeline_split, str):
        return parallel.pipeline_split
    if parallel.pipeline_split == "even" or parallel.num_stages == 1:
        return even_split(num_layers, parallel.num_stages)
    return balanced_split(stage_costs(config, vocab_size), num_layers, parallel.num_stages)


def stage_layers(config: RunConfig, vocab_size: int, stage: int) -> range:
    """Global indices of the backbone layers of a stage."""
    split = stage_split(config, vocab_size)
    start = sum(split[:stage])
    return range(start, start + split[stage])


def even_split(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """The same number of layers everywhere; the first stages take the remainder, as the last one holds the head."""
    base, remainder = divmod(num_layers, num_stages)
    return tuple(base + (stage < remainder) for stage in range(num_stages))


def balanced_split(costs: StageCosts, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """The split whose most expensive stage is cheapest; every stage holds at least one layer.

    Each layer goes to the stage that is cheapest once it has it. Since all layers cost the same this is optimal: any
    other choice would make a more expensive stage.
    """
    split = [1] * num_stages
    for _ in range(num_layers - num_stages):
        after = np.array(costs.of_stages(tuple(split))) + costs.layer
        split[int(after.argmin())] += 1
    return tuple(split)


def stage_costs(config: RunConfig, vocab_size: int) -> StageCosts:
    """Costs of the configured model on its own mix of images; recomputation counts, as it takes time."""
    num_images, counts = typical_counts(config)
    flops = step_flops(config, vocab_size, counts)
    passes = TRAINING_OVER_FORWARD + int(config.parallel.recompute == "full")
    layers = passes * (flops.backbone + flops.attention)
    head = passes * flops.head * (1 - config.data.image_to_text_share)
    replica_ranks = config.parallel.tensor * config.parallel.pipeline
    return StageCosts(
        layer=layers / config.model.num_layers / num_images,
        first=TRAINING_OVER_FORWARD * flops.projector / num_images,
        last=(head + TRAINING_OVER_FORWARD * flops.text) / num_images,
        encoder=encode_flops(config.vision, counts.num_encoded) / replica_ranks / num_images,
    )


def typical_counts(config: RunConfig) -> tuple[int, PackCounts]:
    """(images, their total counts): every bucket with its share of the mix and a typical caption, text to image."""
    vision, resolutions = config.vision, config.data.resolutions
    tokens = placeholder_tokens(config)
    num_caption_tokens = min(TYPICAL_CAPTION_TOKENS, config.text.max_caption_tokens)
    # Buckets of one resolution are equally likely, and the resolutions have different numbers of buckets.
    multiple = math.lcm(*(len(resolution.buckets_px) for resolution in resolutions))
    num_images, total = 0, np.zeros(len(dataclasses.fields(PackCounts)), dtype=np.int64)
    for resolution in resolutions:
        weight = resolution.share * multiple // len(resolution.buckets_px)
        for height, width in resolution.buckets_px:
            grid = (height // vision.downsample, width // vision.downsample)
            sample = placeholder_sample(0, grid, num_caption_tokens, config)
            total += weight * np.array(dataclasses.astuple(count_pack(pack_samples([sample], tokens, 1))))
            num_images += weight
    return num_images, PackCounts(*total.tolist())
