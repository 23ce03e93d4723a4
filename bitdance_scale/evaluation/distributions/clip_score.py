"""CLIP score (Hessel et al., EMNLP 2021, arXiv 2104.08718): how well images fit their prompts.

As torchmetrics defines it, 100 max(cos, 0) of an image and its prompt, with the mean over all. (The paper has 2.5 for
100.) torchmetrics' code (src/torchmetrics/multimodal/clip_score.py) takes the maximum of the mean, which is the same
where no cosine is negative. It also cuts the end mark off texts of more than 77 tokens; here it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.clip import Clip


@dataclass(frozen=True)
class ClipScore:
    """Of a set of images.

    Attributes:
        score: mean of 100 max(cos, 0).
        cosine: mean cosine.
        cosines: float64 [n], of each image.
        num_cut: prompts with more tokens than CLIP reads.
    """

    score: float
    cosine: float
    cosines: np.ndarray
    num_cut: int


def clip_cosines(clip: Clip, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """float64 [n], cosines of images with their prompts.

    Args:
        clip: the network.
        images: uint8 [H, W, 3] each.
        prompts: one of each image.

    Raises:
        ValueError: there are more images than prompts, or fewer.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images have {len(prompts)} prompts")
    found, wanted = clip.embed_images(images), clip.embed_texts(prompts)
    return (found.double() * wanted.double()).sum(dim=1).cpu().numpy()


def clip_score(clip: Clip, batches: Iterable[tuple[Sequence[np.ndarray], Sequence[str]]]) -> ClipScore:
    """The score of images that come in batches, each with its prompts; errors as `clip_cosines`.

    Raises:
        DataError: there is no image.
    """
    cosines, num_cut = [], 0
    for images, prompts in batches:
        cosines.append(clip_cosines(clip, images, prompts))
        num_cut += sum(map(clip.is_cut, prompts))
    values = np.concatenate(cosines) if cosines else np.zeros(0)
    if not len(values):
        raise DataError("there is no image to compute a CLIP score of")
    return ClipScore(float(100 * np.maximum(values, 0).mean()), float(values.mean()), values, num_cut)
