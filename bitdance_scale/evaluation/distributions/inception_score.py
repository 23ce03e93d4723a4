"""The Inception Score (Salimans et al., NeurIPS 2016, arXiv 1606.03498) from sums, in float64.

exp of the mean Kullback-Leibler divergence of p(class | image) from p(class). ADM's suite computes it of every 5,000
images in the order of the file, the last ones of which may be fewer, and takes the mean. The classes are all 1,008 of
the network, whose bias is left out. So it depends on the order: images sorted by class have a far lower score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

IMAGES_PER_PART = 5000


@dataclass
class ScoreSums:
    """What the score needs of images that come in any order; memory does not depend on their number.

    Attributes:
        parts: number of a part of 5,000 images -> float64 [2 + classes]: the number of images, the sum of
            p log p over images and classes, and the sum of p over images.
    """

    parts: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, logits: torch.Tensor, positions: np.ndarray) -> None:
        """Counts images in.

        Args:
            logits: float [n, classes].
            positions: int64 [n], where the images are in the order of all.
        """
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        # A probability of 0 adds nothing, and log_softmax has no infinity.
        rows = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(dim=1, keepdim=True), p], dim=1).cpu().numpy()
        numbers = positions // IMAGES_PER_PART
        for number in np.unique(numbers).tolist():
            self._add({number: rows[numbers == number].sum(axis=0)})

    def join(self, other: ScoreSums) -> None:
        """Counts the images of another rank in."""
        self._add(other.parts)

    def _add(self, parts: Mapping[int, np.ndarray]) -> None:
        for number, sums in parts.items():
            self.parts[number] = self.parts[number] + sums if number in self.parts else sums

    def score(self) -> float:
        """The mean of the scores of the parts, as ADM's suite has it.

        Raises:
            ValueError: there is no image.
        """
        if not self.parts:
            raise ValueError("there is no image to compute an Inception Score of")
        return float(np.mean([_score(sums) for _, sums in sorted(self.parts.items())]))

    def whole_score(self) -> float:
        """The score of all images as one part, on which their order has no influence.

        Raises:
            ValueError: there is no image.
        """
        if not self.parts:
            raise ValueError("there is no image to compute an Inception Score of")
        return _score(np.sum([sums for _, sums in sorted(self.parts.items())], axis=0))


def _score(sums: np.ndarray) -> float:
    negative_entropy, marginal = sums[1] / sums[0], sums[2:] / sums[0]
    known = marginal[marginal > 0]
    return float(np.exp(negative_entropy - (known * np.log(known)).sum()))
