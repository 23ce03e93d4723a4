"""The colour of an object by CLIP (Radford et al., 2021, arXiv 2103.00020), among ten words.

Sources: djghosh13/geneval, evaluation/evaluate_images.py (`ImageCrops`, `color_classification`); LAION-AI/
CLIP_benchmark, clip_benchmark/metrics/zeroshot_classification.py (`zero_shot_classifier`, `run_classification`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from bitdance_scale.evaluation.geneval.rules import COLOURS, Detection

# #999.
_BACKGROUND = 153
_BATCH = 16


class Embedder(Protocol):
    """CLIP: images and texts as vectors of length 1 in one space."""

    def embed_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [n, D], of uint8 images [H, W, 3] of any sizes."""

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, D]."""


def colour_texts(colour: str, name: str) -> tuple[str, str, str]:
    """What an object of a class in a colour may be called."""
    return f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"


def crop(image: np.ndarray, found: Detection) -> np.ndarray:
    """The object alone, uint8 [h, w, 3]: grey outside its mask, cut to its box.

    Args:
        image: uint8 [H, W, 3].
        found: an object in it; without a mask nothing is made grey.
    """
    left, top, right, bottom = (round(side) for side in found.box)
    part = image[top:bottom, left:right]
    if found.mask is None:
        return part
    return np.where(found.mask[top:bottom, left:right, None], part, np.uint8(_BACKGROUND))


class ColourClassifier:
    """Names the colours of objects.

    Args:
        clip: the network.
    """

    def __init__(self, clip: Embedder) -> None:
        self.clip = clip
        self._directions: dict[str, torch.Tensor] = {}

    def __call__(self, image: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of `COLOURS`.

        Args:
            image: uint8 [H, W, 3].
            name: class of the objects.
            objects: in the image.
        """
        names: list[str] = []
        for start in range(0, len(objects), _BATCH):
            features = self.clip.embed_images([crop(image, one) for one in objects[start : start + _BATCH]])
            likeness = features @ self.directions(name).T
            names += [COLOURS[index] for index in likeness.argmax(dim=1).tolist()]
        return names

    def directions(self, name: str) -> torch.Tensor:
        """A unit vector per colour, [10, D]: the mean of the unit vectors of its texts for this class."""
        if name not in self._directions:
            texts = [text for colour in COLOURS for text in colour_texts(colour, name)]
            features = self.clip.embed_texts(texts).unflatten(0, (len(COLOURS), -1))
            self._directions[name] = functional.normalize(features.mean(dim=1), dim=-1)
        return self._directions[name]
