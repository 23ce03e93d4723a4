"""Precision and recall of generated images (Kynkaanniemi et al., NeurIPS 2019, arXiv 1904.06991).

The manifold of a set is the union of balls around its features, each as large as the distance to its third nearest
neighbour. Precision is the share of samples in the manifold of the reference, recall the share of reference images in
that of the samples. k = 3 and the features are ADM's suite's (`ManifoldEstimator` in openai/guided-diffusion,
evaluations/evaluator.py).

Squared distances are |u|^2 + |v|^2 - 2 u v, which of near features is a small difference of large numbers. ADM's suite
takes it in float16 where that does not overflow. Here it is float64 of features around the mean of the reference, which
leaves an error of about 1e-15 |u|^2. float32 would need borderline pairs to be computed again, and saves little: the
products of 50,000 images are 2% of the arithmetic of their Inception features. What is below 1e-12 of |u|^2 + |v|^2 is
taken for 0, so that an image is at no distance from its copy, which balls of radius 0 depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

NUM_NEIGHBOURS = 3
_BLOCK = 4096
_SAME = 1e-12


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class _Block(NamedTuple):
    rows: slice
    features: torch.Tensor
    norms: torch.Tensor

    def distances(self, other: _Block) -> torch.Tensor:
        """Squared distances, float64 [n, m]."""
        scale = self.norms[:, None] + other.norms[None]
        found = torch.addmm(scale, self.features, other.features.T, alpha=-2)
        return torch.where(found <= _SAME * scale, 0.0, found)


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, device: torch.device, block: int = _BLOCK
) -> PrecisionRecall:
    """Precision and recall of samples against a reference.

    Memory beyond the features is about 4 * 8 * block^2 bytes, half a GB with the default, whatever their number.

    Args:
        reference: float32 [M, D], features of the reference.
        samples: float32 [N, D], features of the samples.
        device: where distances are computed.
        block: features whose distances are computed at once, of either set.

    Raises:
        ValueError: a set has fewer than 4 features.
    """
    centre = torch.from_numpy(reference.mean(axis=0, dtype=np.float64)).to(device)

    def blocks(features: np.ndarray, start: int = 0) -> Iterator[_Block]:
        for first in range(start, len(features), block):
            rows = slice(first, min(first + block, len(features)))
            values = torch.from_numpy(features[rows]).to(device, torch.float64) - centre
            yield _Block(rows, values, values.square().sum(dim=1))

    def radii(features: np.ndarray) -> torch.Tensor:
        """Squared distances to the third nearest other, float64 [n]."""
        number = NUM_NEIGHBOURS + 1  # Every feature is the nearest one of itself.
        if len(features) < number:
            raise ValueError(f"{len(features)} images have no third nearest neighbour; there must be at least {number}")
        nearest = torch.full((len(features), number), torch.inf, dtype=torch.float64, device=device)
        for one in blocks(features):
            for other in blocks(features, one.rows.start):
                found = one.distances(other)
                pairs = [(one, found)] if one.rows == other.rows else [(one, found), (other, found.T)]
                for part, distances in pairs:
                    candidates = torch.cat([nearest[part.rows], distances], dim=1)
                    nearest[part.rows] = candidates.topk(number, dim=1, largest=False).values
        return nearest.amax(dim=1)

    reference_radii, sample_radii = radii(reference), radii(samples)
    is_near_reference = torch.zeros(len(samples), dtype=torch.bool, device=device)
    is_near_samples = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for one in blocks(reference):
        for other in blocks(samples):
            found = one.distances(other)
            is_near_reference[other.rows] |= (found <= reference_radii[one.rows, None]).any(dim=0)
            is_near_samples[one.rows] |= (found <= sample_radii[None, other.rows]).any(dim=1)
    return PrecisionRecall(*(share.double().mean().item() for share in (is_near_reference, is_near_samples)))
