"""Samples and packs like those of a run, made from its configuration alone, to estimate what the run needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitdance_scale.config.data_rules import MAX_MARKUP_TOKENS, NUM_RESOLUTION_TOKENS
from bitdance_scale.config.schema import NetworkConfig, RunConfig
from bitdance_scale.data.plan.apportion import Apportionment
from bitdance_scale.data.plan.buckets import resolution_buckets
from bitdance_scale.data.plan.packing import CostModel, partition_batch
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.sequence.layout import ImageTokens, SequenceTokens, num_positions, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample
from bitdance_scale.vision.codes import code_bytes


def typical_packs(config: RunConfig, num_replicas: int) -> list[Pack]:
    """The packs of one step of one replica, the pack with the most text targets first; all codes are zero.

    The resolutions have their shares, and every bucket of a resolution occurs equally often. Captions have the longest
    length that is allowed. Real ones are mostly shorter, so real packs hold more images, fewer text targets and about
    as many positions.

    Args:
        config: the run; sizes, mix and limits are read.
        num_replicas: data-parallel ranks.

    Raises:
        ConfigError: the batch cannot be divided among so many replicas.
    """
    samples, packs = _partition(config, num_replicas)
    made = [_pack(samples, places, config) for places in packs]
    return sorted(made, key=lambda pack: (-len(pack.text_targets), -pack.num_positions))


def fullest_typical_pack(config: RunConfig, num_replicas: int) -> tuple[Pack, int]:
    """(the first of `typical_packs`, how many they are), without making the others.

    Raises:
        ConfigError: as `typical_packs`.
    """
    samples, packs = _partition(config, num_replicas)
    tokens, multiple = placeholder_tokens(config), config.data.pack_multiple

    def size(places: Sequence[int]) -> tuple[int, int]:
        num_used = int(_lengths([samples[place] for place in places], tokens).sum())
        # Captions have one length, so there are as many text targets as samples.
        return len(places), num_used + -num_used % multiple

    return _pack(samples, max(packs, key=size), config), len(packs)


def typical_lengths(config: RunConfig, num_caption_tokens: int) -> np.ndarray:
    """int64 [B], positions of the samples of a batch, mixed as in `typical_packs`; captions have one length."""
    return _lengths(_samples(config, num_caption_tokens), placeholder_tokens(config))


def placeholder_tokens(config: NetworkConfig | RunConfig) -> SequenceTokens:
    """The special tokens of a network for when only shapes matter; those of text-to-image all have id 0."""
    if not config.model.parts.has_text:
        return load_condition(config).image_tokens
    queries = (0,) * (config.vision.block_tokens - 1)
    return ImageTokens(0, 0, (0,) * NUM_RESOLUTION_TOKENS, queries, is_causal=config.model.mask == "causal")


def placeholder_sample(
    key: int, grid: tuple[int, int], num_caption_tokens: int, config: NetworkConfig | RunConfig
) -> Sample:
    """A sample of an image to draw, with the longest chat markup that a tokenizer may need, or of some class."""
    if not config.model.parts.has_text:
        # "No class" has as many tokens as a class, and needs no class map.
        return load_condition(config).drawing_sample(key, "", grid, is_caption_dropped=True)
    before_ids = np.zeros(MAX_MARKUP_TOKENS - 1 + num_caption_tokens, dtype=np.int64)
    return Sample(
        key=key,
        grid=grid,
        before_ids=before_ids,
        after_ids=np.zeros(1, dtype=np.int64),
        first_target_before=1,
        first_target_after=1,
    )


def _partition(config: RunConfig, num_replicas: int) -> tuple[list[Sample], list[list[int]]]:
    """(samples of a global batch, places of those of each pack of the first replica); captions are the longest."""
    samples = _samples(config, config.text.max_caption_tokens)
    ranks = partition_batch(
        _lengths(samples, placeholder_tokens(config)),
        num_replicas,
        config.data.max_pack_tokens,
        CostModel.of_model(config.model),
        config.parallel.packs_multiple,
        config.data.pack_multiple,
    )
    return samples, ranks[0]


def _pack(samples: Sequence[Sample], places: Sequence[int], config: RunConfig) -> Pack:
    pack = pack_samples([samples[place] for place in places], placeholder_tokens(config), config.data.pack_multiple)
    token_bytes = code_bytes(config.vision.num_bits, config.vision.latents)
    return pack.with_bits(np.zeros((len(pack.vision_cells), token_bytes), dtype=np.uint8))


def _lengths(samples: Sequence[Sample], tokens: SequenceTokens) -> np.ndarray:
    return np.array([num_positions(sample, tokens) for sample in samples])


def _samples(config: RunConfig, num_caption_tokens: int) -> list[Sample]:
    resolutions = [resolution for resolution in config.data.resolutions if resolution.share > 0]
    labels = Apportionment([resolution.share for resolution in resolutions]).labels(0, config.data.global_batch)
    grids = [resolution_buckets(resolution) // config.vision.downsample for resolution in resolutions]
    num_drawn = [0] * len(resolutions)
    samples = []
    for key, label in enumerate(labels.tolist()):
        height, width = grids[label][num_drawn[label] % len(grids[label])].tolist()
        num_drawn[label] += 1
        samples.append(placeholder_sample(key, (height, width), num_caption_tokens, config))
    return samples
