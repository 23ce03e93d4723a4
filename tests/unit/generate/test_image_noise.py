"""Which numbers an image is drawn from."""

from __future__ import annotations

import numpy as np
import torch

from bitdance_scale.generate.image_noise import GeneratorNoise, ImageNoise
from bitdance_scale.sequence.noise import Purpose, generator

CPU = torch.device("cpu")
# (K, P, C); P * C is no multiple of 16, where torch fills tensors in another order than part by part.
SHAPE = (5, 3, 7)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_generator_draws_the_batch_tensor_by_tensor():
    source = numbers(3)
    expected = [torch.stack([torch.randn(2, 3, 7, generator=source) for _ in range(5)]) for _ in range(2)]
    noise = GeneratorNoise(numbers(3), 2, SHAPE, CPU)
    assert all(torch.equal(noise(), block) for block in expected)


def test_a_list_gives_each_image_its_own_stream():
    together = GeneratorNoise([numbers(1), numbers(2)], 2, SHAPE, CPU)
    alone = GeneratorNoise([numbers(2)], 1, SHAPE, CPU)
    for _ in range(3):
        assert torch.equal(together()[:, 1:], alone())


def test_without_a_generator_torch_s_own_is_used():
    torch.manual_seed(7)
    first = GeneratorNoise(None, 2, SHAPE, CPU)()
    torch.manual_seed(7)
    assert torch.equal(GeneratorNoise(None, 2, SHAPE, CPU)(), first)


def test_training_s_noise_is_drawn_tensor_by_tensor_from_its_stream():
    streams = [generator(4, Purpose.SAMPLE_IMAGE, 0, number) for number in (0, 9)]
    noise = ImageNoise(4, [0, 9], SHAPE, CPU)
    for _ in range(2):
        rows = [[stream.standard_normal((3, 7), dtype=np.float32) for _ in range(5)] for stream in streams]
        assert torch.equal(noise(), torch.from_numpy(np.stack(rows, axis=1)))
