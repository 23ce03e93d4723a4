"""A network of few features in place of Inception."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.evaluation.distributions import features, inception_score, reference
from bitdance_scale.evaluation.inception import Activations

POOL, SPATIAL, CLASSES = 6, 5, 12


class SmallNetwork(torch.nn.Module):
    """Three linear layers of the pixels in place of Inception."""

    def __init__(self, digest: str = "a" * 64) -> None:
        super().__init__()
        self.digest = digest
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(48, POOL + SPATIAL + CLASSES, generator=generator))

    @torch.no_grad()
    def activations(self, images):
        # In float64, whose rounding to float32 does not depend on the size of a batch.
        found = (torch.from_numpy(images).double().flatten(1) / 255) @ self.weight.double()
        return Activations(*found.float().split([POOL, SPATIAL, CLASSES], dim=1))


def use_few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all that counts features expect those of `SmallNetwork`, and the Inception Score parts of 20 images."""
    for module in (features, reference):
        monkeypatch.setattr(module, "NUM_FEATURES", POOL)
        monkeypatch.setattr(module, "NUM_SPATIAL_FEATURES", SPATIAL)
    numbers = {("mu", "sigma"): POOL, ("mu_s", "sigma_s"): SPATIAL}
    monkeypatch.setattr(reference, "_NUM_FEATURES", numbers)
    monkeypatch.setattr(inception_score, "IMAGES_PER_PART", 20)
