"""What every scorer of single pictures is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.image_score import ImageScore

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class DrawnImage:
    """An image of a prompt.

    Attributes:
        prompt: of a benchmark.
        k: number of the image among those of the prompt.
        pixels: uint8 [H, W, 3].
    """

    prompt: Prompt
    k: int
    pixels: np.ndarray


class PictureScorer(Protocol):
    """Scores images one by one."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Those that it computes with, on whichever device they are; none: it has no network."""
        ...

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        """The score of every image, in order.

        Images of one call go through networks together, which may change the last digits of what these find.

        Raises:
            BitDanceError: a prompt is none of the benchmark that the scorer is for.
        """
        ...


@contextlib.contextmanager
def on_device(scorers: Iterable[PictureScorer], device: torch.device) -> Iterator[None]:
    """Within it the networks of scorers are on a device, after it on the CPU."""
    networks = list({id(network): network for scorer in scorers for network in scorer.networks}.values())
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network in networks:
            network.to("cpu")
