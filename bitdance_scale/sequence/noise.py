"""Counter-based noise: every random number of a sample is a function of (seed, step, sample) and of nothing else.

It does not depend on the rank, the layout, the worker or the position in a pack. Two layouts of a run, or a run and its
resumption, therefore draw the same numbers, and losses and gradients can be compared across layouts. The generator is
Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in numpy, whose stream is the same in every
version and on every machine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from bitdance_scale.sequence.pack import Pack


class Purpose(enum.IntEnum):
    """What a stream of numbers is for; streams of different purposes are independent."""

    TRAIN = 1
    EVALUATE = 2
    SAMPLE_IMAGE = 3
    AUGMENT = 4
    TOKENIZER = 5


def generator(seed: int, purpose: Purpose, step: int, key: int) -> np.random.Generator:
    """The generator of one sample at one step.

    Args:
        seed: seed of the run, 0 <= seed < 2^31.
        purpose: what the numbers are for.
        step: optimiser step (of `AUGMENT`: epoch of the sample), 0 <= step < 2^31.
        key: sample key (or image number), 0 <= key < 2^63.
    """
    low = (seed << 33) | (step << 2) | (int(purpose) & 3)
    # The key has two bits for the purpose, and the rest of it begins the counter, at a distance that no stream crosses.
    counter = np.array([0, 0, 0, int(purpose) >> 2], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([low, key], dtype=np.uint64), counter=counter))


@dataclass(frozen=True)
class PackNoise:
    """All random numbers that training on one pack needs.

    Attributes:
        flip_level: float32 [V, C], u ~ U(0, 1): the element is flipped with probability flip_max * u. It is 0 in images
            that are the context of a caption: the model must describe what is there (published release).
        flip_draw: float32 [V, C], U(0, 1), decides the flip.
        time_normal: float32 [K * Q / P], N(0, 1) per draw and predicted block, which `model/flow.py` turns into a flow
            time; K draws one after the other.
        noise: float32 [K * Q, C], the Gaussian ends of the flow.
        dropout: int64 [N], a number of every sample, from which follows what is dropped of it (`model/low_rank.py`).
    """

    flip_level: np.ndarray
    flip_draw: np.ndarray
    time_normal: np.ndarray
    noise: np.ndarray
    dropout: np.ndarray


def pack_noise(
    pack: Pack, num_bits: int, seed: int, step: int, purpose: Purpose = Purpose.TRAIN, num_draws: int = 1
) -> PackNoise:
    """Draws the noise of a pack, each sample's from its own generator.

    Args:
        pack: the pack.
        num_bits: C.
        seed: seed of the run.
        step: optimiser step.
        purpose: what it is for.
        num_draws: K, flow times and ends of the flow per predicted block; the first is the same for every K.
    """
    uniforms: list[np.ndarray] = []
    # By draw, then by sample.
    times: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.float32)] for _ in range(num_draws)]
    noises: list[list[np.ndarray]] = [[np.zeros((0, num_bits), dtype=np.float32)] for _ in range(num_draws)]
    dropouts = []
    for key, (start, stop), is_predicted in zip(
        pack.sample_keys, pack.sample_vision, pack.sample_predicts, strict=True
    ):
        numbers = generator(seed, purpose, step, int(key))
        num_vision = int(stop - start)
        shape = (2, num_vision, num_bits)
        uniforms.append(numbers.random(shape, dtype=np.float32) if is_predicted else np.zeros(shape, dtype=np.float32))
        if is_predicted:
            for time, noise in zip(times, noises, strict=True):
                time.append(numbers.standard_normal(num_vision // pack.block_tokens, dtype=np.float32))
                noise.append(numbers.standard_normal((num_vision, num_bits), dtype=np.float32))
        # The last number of the sample, so that the others are what they are without it.
        dropouts.append(int(numbers.integers(1 << 62)))
    flips = np.concatenate(uniforms, axis=1)
    return PackNoise(
        flip_level=flips[0],
        flip_draw=flips[1],
        time_normal=np.concatenate([part for draw in times for part in draw]),
        noise=np.concatenate([part for draw in noises for part in draw]),
        dropout=np.array(dropouts, dtype=np.int64),
    )
