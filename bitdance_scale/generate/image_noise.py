"""The noise that images are drawn from.

Draw order of one block (published release): a start tensor, then one per stochastic step of the solver. All of them are
drawn before the first step.

Shape suffixes: K draws per block, I images, P vision tokens per block, C bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bitdance_scale.sequence.noise import Purpose, generator


class ImageNoise:
    """The noise of pictures drawn while training: image i draws from stream i of a seed, whatever batch it is in.

    Args:
        seed: seed of the pictures.
        image_numbers: i of every image.
        shape: (K, P, C).
        device: where the noise is used.
    """

    def __init__(
        self, seed: int, image_numbers: Sequence[int], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self._streams = [generator(seed, Purpose.SAMPLE_IMAGE, 0, number) for number in image_numbers]
        self._shape, self._device = shape, device

    def __call__(self) -> torch.Tensor:
        """The noise of the next block, N(0, 1), float32 [K, I, P, C]."""
        rows = [stream.standard_normal(self._shape, dtype=np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(rows, axis=1)).to(self._device)


class GeneratorNoise:
    """The noise of a pipeline's images, from generators of torch.

    One generator draws tensors [I, P, C] for the whole batch, as the release does. A list gives each image its own
    stream of tensors [P, C], so that an image is the same whatever batch it is in. Generators of the CPU serve a GPU
    with the numbers that they would give on the CPU.

    Args:
        generators: one per image, or one for all; None is torch's own generator of `device`.
        num_images: I.
        shape: (K, P, C).
        device: where the noise is used.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator] | None,
        num_images: int,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self._generators, self._device = generators, device
        self._num_images, self._shape = num_images, shape

    def __call__(self) -> torch.Tensor:
        """The noise of the next block, N(0, 1), float32 [K, I, P, C]."""
        num_draws, *shape = self._shape
        if self._generators is None or isinstance(self._generators, torch.Generator):
            return _draw(self._generators, (num_draws, self._num_images, *shape), self._device).to(self._device)
        images = [_draw(numbers, self._shape, self._device) for numbers in self._generators]
        return torch.stack([image.to(self._device) for image in images], dim=1)


def _draw(numbers: torch.Generator | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Normal tensors, drawn one by one along the first axis, where the generator is."""
    noise = torch.empty(shape, dtype=torch.float32, device=device if numbers is None else numbers.device)
    # One call for all would order the numbers differently.
    for row in noise:
        row.normal_(generator=numbers)
    return noise
