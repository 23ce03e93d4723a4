"""The Frechet distance of two sets of images (Heusel et al., NeurIPS 2017, arXiv 1706.08500), in float64.

With Inception features it is the FID; of originals against their reconstructions it is called rFID.
"""

from __future__ import annotations

import numpy as np
import torch

USUAL_IMAGES = 50_000
"""What the distance is reported for. That of fewer images is higher, by an amount that depends on their number."""


class FeatureStatistics:
    """Mean and covariance of features that come in batches; memory does not depend on their number.

    Args:
        num_features: D.
        device: where the sums are.

    Attributes:
        sums: float64 [D + 1, D + 1], the sum of the outer products of (1, features) with themselves. Those of several
            ranks are added up.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        """Counts features [N, D] in."""
        rows = torch.nn.functional.pad(features.to(self.sums), (1, 0), value=1.0)
        self.sums.addmm_(rows.T, rows)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean [D], covariance [D, D]), float64; the covariance is divided by N - 1.

        Raises:
            ValueError: there are fewer than two features.
        """
        sums = self.sums.cpu().numpy()
        number = sums[0, 0]
        if number < 2:
            raise ValueError(f"{number:.0f} images have no covariance; there must be at least 2")
        mean = sums[0, 1:] / number
        return mean, (sums[1:, 1:] - number * np.outer(mean, mean)) / (number - 1)


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two (mean, covariance).

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so
    that covariances of fewer images than features are no exception.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = first, second
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = root @ covariance_2 @ root
    values = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.trace(covariance_1) + np.trace(covariance_2) - 2 * np.sqrt(np.maximum(values, 0.0)).sum()
    return float(np.square(mean_1 - mean_2).sum() + trace)
