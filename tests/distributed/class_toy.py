"""A small class-conditional model and a small global batch, for comparing layouts."""

from __future__ import annotations

import dataclasses

import numpy as np

from bitdance_scale.config.schema import ClassesSection, RunConfig, TextSection
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.sequence.layout import ClassTokens, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample
from bitdance_scale.vision.codes import pack_codes
from tests.distributed.toy import toy_config

GRID = (4, 4)
# Six classes with "no class" and three queries make 21 rows, which divide over no two ranks.
CLASSES = ClassesSection(num_classes=5, num_tokens=3, grid=GRID)
NUM_SAMPLES = 16
# The published recipe: on matrices, but not on the embedding and the projector.
DECAY = {"weight_decay": 0.5, "decays_vectors": False, "decay_exempt": ("embedding.weight", "projector.*")}


def class_config(block_side: int = 2, **parallel: object) -> RunConfig:
    """Four layers of the published network's shape, two draws per block, float32; keywords go to `parallel`."""
    config = toy_config(**parallel)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, family="class_conditional", num_kv_heads=4),
        head=dataclasses.replace(config.head, diff_batch_mul=2),
        vision=dataclasses.replace(config.vision, block_side=block_side),
        text=TextSection(),
        optim=dataclasses.replace(config.optim, average_decay=0.7, **DECAY),
        classes=CLASSES,
        data=dataclasses.replace(config.data, global_batch=NUM_SAMPLES),
    )


def ablated(config: RunConfig) -> RunConfig:
    """The same with the ablations of Tables 13 and 14: bit-wise head, raster order, causal mask."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mask="causal"),
        head=dataclasses.replace(config.head, kind="bitwise", diff_batch_mul=1),
        vision=dataclasses.replace(config.vision, order="raster"),
    )


def continuous(config: RunConfig) -> RunConfig:
    """The same with the ablation of Table 12: continuous latents."""
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, latents="continuous", flip_max=0.0))


def random_codes(draw: np.random.Generator, config: RunConfig, num_tokens: int = GRID[0] * GRID[1]) -> np.ndarray:
    """Codes of tokens, uint8 [num_tokens, code bytes]."""
    if config.vision.latents == "bits":
        return draw.integers(0, 256, (num_tokens, config.vision.num_bits // 8), dtype=np.uint8)
    values = draw.standard_normal((num_tokens, config.vision.num_bits), dtype=np.float32)
    return pack_codes(values, config.vision.latents)


def class_tokens(config: RunConfig) -> ClassTokens:
    """The rows of the toy's table."""
    tokens = load_condition(config).image_tokens
    assert isinstance(tokens, ClassTokens)
    return tokens


def class_samples(config: RunConfig) -> list[Sample]:
    """Samples of all classes and of "no class"."""
    condition = load_condition(config)
    return [
        condition.drawing_sample(3000 + index, str(index % 6), GRID, is_caption_dropped=index % 6 == 5)
        for index in range(NUM_SAMPLES)
    ]


def class_packs(data_rank: int, data_size: int, num_micro: int, config: RunConfig) -> list[Pack]:
    """This replica's micro-batches, with bits; the first packs hold more samples than the last."""
    samples, num_packs = class_samples(config), data_size * num_micro
    draw = np.random.default_rng(13)
    bits = [random_codes(draw, config) for _ in samples]
    owner = [int((index / len(samples)) ** 1.5 * num_packs) for index in range(len(samples))]
    packs = []
    for number in range(data_rank * num_micro, (data_rank + 1) * num_micro):
        chosen = [index for index, pack in enumerate(owner) if pack == number]
        pack = pack_samples([samples[index] for index in chosen], class_tokens(config), config.data.pack_multiple)
        packs.append(pack.with_bits(np.concatenate([bits[index] for index in chosen])))
    return packs
