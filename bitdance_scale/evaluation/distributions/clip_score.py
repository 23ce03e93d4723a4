"""CLIP score (Hessel et al., EMNLP 2021, arXiv 2104.08718): how well images fit their prompts.

As torchmetrics defines it, 100 max(cos, 0) of an image and its prompt, with the mean over all. (The paper has 2.5 for
100.) torchmetrics' code (src/torchmetrics/multimodal/clip_score.py) takes the maximum of the mean, which is the same
where no cosine is negative. It also cuts the end mark off texts of more than 77 tokens; here it stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitdance_scale.evaluation.clip import Clip


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
