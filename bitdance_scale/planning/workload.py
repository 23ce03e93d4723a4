"""What one step of a run asks for: how many packs of which contents, on a typical mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.packing import CostModel, fits
from bitdance_scale.data.plan.synthetic_packs import typical_lengths
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.cost import PackCounts, count_pack
from bitdance_scale.parallel.stage_split import TYPICAL_CAPTION_TOKENS, typical_counts
from bitdance_scale.sequence.pack import Pack


@dataclass(frozen=True)
class Workload:
    """A step of a whole job.

    Attributes:
        num_images: global batch.
        num_micro_batches: packs of one replica.
        num_positions: of all packs of all replicas, padding included.
        counts: of all packs of all replicas.
    """

    num_images: int
    num_micro_batches: int
    num_positions: int
    counts: PackCounts


def step_lengths(config: RunConfig) -> np.ndarray:
    """int64 [B], positions of the samples of a global batch with captions of typical length."""
    return typical_lengths(config, min(TYPICAL_CAPTION_TOKENS, config.text.max_caption_tokens))


def typical_workload(config: RunConfig, lengths: np.ndarray, num_replicas: int) -> Workload:
    """A global batch in the fewest packs that fit.

    Args:
        config: the run.
        lengths: of `step_lengths`.
        num_replicas: data-parallel ranks.

    Raises:
        ConfigError: the batch cannot be divided among so many replicas.
    """
    data = config.data
    cost_model, multiple = CostModel.of_model(config.model), config.parallel.packs_multiple
    num_packs = -(-int(lengths.sum()) // (num_replicas * data.max_pack_tokens))
    num_packs += -num_packs % multiple
    while not fits(lengths, num_packs * num_replicas, data.max_pack_tokens, cost_model):
        num_packs += multiple
        if num_packs * num_replicas > len(lengths):
            raise ConfigError(
                f"data.global_batch = {data.global_batch}: its images do not fill packs of {data.max_pack_tokens} "
                f"positions on {num_replicas} replicas; raise data.max_pack_tokens or data.global_batch"
            )
    per_pack = -(-int(lengths.sum()) // (num_packs * num_replicas))
    padded = min(data.max_pack_tokens, per_pack + -per_pack % data.pack_multiple)
    return Workload(
        num_images=data.global_batch,
        num_micro_batches=num_packs,
        num_positions=max(padded * num_packs * num_replicas, int(lengths.sum())),
        counts=_counts(config),
    )


def workload_of(packs: Sequence[Pack], num_replicas: int) -> Workload:
    """A step of given packs, which the replicas divide evenly."""
    assert len(packs) % num_replicas == 0, "every replica has as many packs"
    return Workload(
        num_images=sum(len(pack.sample_keys) for pack in packs),
        num_micro_batches=len(packs) // num_replicas,
        num_positions=sum(pack.num_positions for pack in packs),
        counts=sum((count_pack(pack) for pack in packs), PackCounts()),
    )


def _counts(config: RunConfig) -> PackCounts:
    """Counts of a global batch; images that are the context of a caption are not predicted."""
    num_images, counts = typical_counts(config)
    values = np.array(dataclasses.astuple(counts)) * (config.data.global_batch / num_images)
    drawn = 1 - config.data.image_to_text_share
    scaled = PackCounts(*np.rint(values).astype(np.int64).tolist())
    return dataclasses.replace(
        scaled, num_predicted=round(scaled.num_predicted * drawn), num_blocks=round(scaled.num_blocks * drawn)
    )
