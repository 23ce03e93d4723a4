import numpy as np
import pytest
import scipy.linalg
import torch

from bitdance_scale.evaluation.frechet import FeatureStatistics, frechet_distance


def moments(features: np.ndarray, batch: int = 7) -> tuple[np.ndarray, np.ndarray]:
    statistics = FeatureStatistics(features.shape[1], torch.device("cpu"))
    for start in range(0, len(features), batch):
        statistics.add(torch.from_numpy(features[start : start + batch]).float())
    return statistics.moments()


def test_the_distance_is_the_formula_with_a_matrix_root():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(90, 6)) @ rng.normal(size=(6, 6)) + 3, 0.5 + rng.gamma(2.0, size=(80, 6))
    first, second = first.astype(np.float32).astype(np.float64), second.astype(np.float32).astype(np.float64)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-9)
    assert expected > 1
    assert frechet_distance(moments(first), moments(first)) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features():
    # Covariances without an inverse; the trace of the root is then the sum of the singular values of a small product.
    rng = np.random.default_rng(1)
    first, second = (rng.normal(size=(5, 40)).astype(np.float32).astype(np.float64) for _ in range(2))
    centred = [(part - part.mean(axis=0)) / 2 for part in (first, second)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(np.square(part).sum() for part in centred)
    expected = np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + spread - 2 * root
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-6)


def test_statistics_of_several_ranks_add_up():
    features = torch.randn(11, 4, generator=torch.Generator().manual_seed(2))
    parts = [FeatureStatistics(4, torch.device("cpu")) for _ in range(2)]
    parts[0].add(features[:8])
    parts[1].add(features[8:])
    parts[0].sums += parts[1].sums
    mean, covariance = parts[0].moments()
    assert mean == pytest.approx(features.double().mean(dim=0).numpy())
    assert covariance == pytest.approx(np.cov(features.double().numpy(), rowvar=False))
    with pytest.raises(ValueError, match="0 images have no covariance"):
        FeatureStatistics(4, torch.device("cpu")).moments()
