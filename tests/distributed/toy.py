"""A small model and a small global batch, for comparing layouts."""

from __future__ import annotations

import dataclasses

import numpy as np

from bitdance_scale.config.data_schema import DataSection, Resolution
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import (
    CheckpointSection,
    HeadSection,
    LossSection,
    ModelSection,
    ObserveSection,
    OptimSection,
    RunConfig,
    RunSection,
    SampleSection,
    TextSection,
    VisionSection,
)
from bitdance_scale.sequence.layout import ImageTokens, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample

# 61 text entries, 2 markup tokens, 40 resolutions, 3 queries and one more: 107 entries divide over no two ranks, so
# that tables are padded under tensor parallelism.
VOCAB_SIZE = 107
# Context images have queries: the recorded curve (`tests/golden`) is older than the setting.
TOKENS = ImageTokens(
    vision_start=61,
    vision_end=62,
    resolution=tuple(range(63, 103)),
    queries=(103, 104, 105),
    has_context_queries=True,
)
GRIDS = ((2, 2), (4, 4), (2, 6), (4, 2))


def toy_config(**parallel: int) -> RunConfig:
    """Four layers of Qwen3's shape, float32, p = 2; keyword arguments go to `parallel`."""
    return RunConfig(
        run=RunSection(name="toy", steps=3, seed=5, dtype="float32"),
        model=ModelSection(
            num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96, init_std=0.05
        ),
        head=HeadSection(width=32, num_blocks=2, num_adaln=1, head_dim=8),
        vision=VisionSection(weights="", num_bits=8, channels=32, channel_mult=(1, 1), num_res_blocks=1, block_side=2),
        text=TextSection(kind="sentencepiece", path="unused"),
        data=DataSection(
            shards=("unused",),
            global_batch=8,
            resolutions=(Resolution(side_px=8, share=1, buckets_px=((8, 8),)),),
            max_pack_tokens=256,
            pack_multiple=8,
        ),
        parallel=ParallelSection(**parallel),
        # A raised epsilon: at 1e-15 Adam turns rounding on near-zero gradients into sign flips.
        optim=OptimSection(lr=1e-3, warmup_steps=0, eps=1e-4, clip_norm=1.0),
        loss=LossSection(),
        checkpoint=CheckpointSection(),
        sample=SampleSection(size_px=(8, 8), num_steps=4, guidance=3.0),
        observe=ObserveSection(wandb_mode="disabled"),
    )


def toy_samples(num_samples: int = 8) -> list[Sample]:
    """Samples with captions of uneven length, mixed grids, one dropped caption and one image-to-text."""
    numbers = np.random.default_rng(3)
    samples = []
    for index in range(num_samples):
        before = numbers.integers(0, 61, size=2 + int(numbers.integers(0, 9)))
        sample = Sample(
            key=1000 + index,
            grid=GRIDS[index % len(GRIDS)],
            before_ids=before,
            after_ids=np.array([7]),
            first_target_before=len(before) if index == 2 else 1,
            first_target_after=1,
        )
        if index == 5:
            after = numbers.integers(0, 61, size=6)
            sample = dataclasses.replace(
                sample, first_target_before=len(before), after_ids=after, first_target_after=2, predicts_image=False
            )
        samples.append(sample)
    return samples


def lopsided_samples() -> list[Sample]:
    """Sixteen samples: four without captions, four image-to-text, eight with captions of uneven length."""
    numbers = np.random.default_rng(7)
    samples = []
    for index in range(16):
        before = numbers.integers(0, 61, size=2 + int(numbers.integers(0, 12)))
        is_dropped, is_context = index < 4, 4 <= index < 8
        after = numbers.integers(0, 61, size=7) if is_context else np.array([7])
        samples.append(
            Sample(
                key=2000 + index,
                grid=GRIDS[int(numbers.integers(len(GRIDS)))],
                before_ids=before,
                after_ids=after,
                first_target_before=len(before) if is_dropped or is_context else 1,
                first_target_after=2 if is_context else 1,
                predicts_image=not is_context,
            )
        )
    return samples


def lopsided_packs(data_rank: int, data_size: int, num_micro: int, config: RunConfig) -> list[Pack]:
    """This replica's micro-batches of `lopsided_samples`, in order.

    With four packs or more, the first have no text target and the next no vision target.
    """
    samples, num_packs = lopsided_samples(), data_size * num_micro
    owner = [index * num_packs // len(samples) for index in range(len(samples))]
    return _packs(samples, owner, range(data_rank * num_micro, (data_rank + 1) * num_micro), config)


def toy_packs(data_rank: int, data_size: int, num_micro: int, config: RunConfig) -> list[Pack]:
    """This replica's micro-batches; the samples are divided unevenly, so that counts differ between packs."""
    samples = toy_samples(config.data.global_batch)
    num_packs = data_size * num_micro
    # Pack 0 takes what is left after one or two samples for each of the others.
    owner = [min(index // 2 + 1, num_packs - 1) if index < 2 * (num_packs - 1) else 0 for index in range(len(samples))]
    return _packs(samples, owner, range(data_rank * num_micro, (data_rank + 1) * num_micro), config)


def _packs(samples: list[Sample], owner: list[int], numbers: range, config: RunConfig) -> list[Pack]:
    """The packs of these numbers, with bits; owner[i] is the pack of sample i."""
    draw = np.random.default_rng(11)
    bits = [
        draw.integers(0, 256, size=(sample.grid[0] * sample.grid[1], config.vision.num_bits // 8), dtype=np.uint8)
        for sample in samples
    ]
    packs = []
    for number in numbers:
        chosen = [index for index, pack in enumerate(owner) if pack == number]
        pack = pack_samples([samples[index] for index in chosen], TOKENS, config.data.pack_multiple)
        packs.append(pack.with_bits(np.concatenate([bits[index] for index in chosen])))
    return packs
