"""Inception Score, precision and recall against plain float64 computations; parts of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.distributions import features, inception_score
from bitdance_scale.evaluation.distributions.features import ImageFeatures
from bitdance_scale.evaluation.distributions.inception_score import ScoreSums
from bitdance_scale.evaluation.distributions.manifold import precision_recall
from bitdance_scale.evaluation.inception import Activations

CPU = torch.device("cpu")


def plain_inception_score(logits: np.ndarray, part: int) -> float:
    scores = []
    for first in range(0, len(logits), part):
        rows = logits[first : first + part].astype(np.float64)
        p = np.exp(rows - rows.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores))


def test_the_inception_score_of_parts_in_any_order_and_on_two_ranks(monkeypatch):
    monkeypatch.setattr(inception_score, "IMAGES_PER_PART", 10)
    logits = 2 * np.random.default_rng(0).normal(size=(25, 30)).astype(np.float32)
    ranks = [ScoreSums(), ScoreSums()]
    order = np.random.default_rng(1).permutation(25)
    for rank, sums in enumerate(ranks):
        for positions in (order[rank::2][:4], order[rank::2][4:]):
            sums.add(torch.from_numpy(logits[positions]), positions)
    ranks[0].join(ranks[1])
    assert ranks[0].score() == pytest.approx(plain_inception_score(logits, 10), rel=1e-12)
    assert ranks[0].whole_score() == pytest.approx(plain_inception_score(logits, 25), rel=1e-12)
    assert ranks[0].score() < ranks[0].whole_score()


def test_the_inception_score_of_certain_classes_is_their_number():
    # Probabilities of exactly 0, whose logarithm a plain formula would multiply with.
    sums = ScoreSums()
    sums.add(2000 * torch.eye(6).repeat(3, 1), np.arange(18))
    assert sums.score() == pytest.approx(6, rel=1e-12)
    with pytest.raises(ValueError, match="no image"):
        ScoreSums().score()


def plain_precision_recall(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.square(one[:, None].astype(np.float64) - other[None]).sum(axis=-1)

    def radii(features: np.ndarray) -> np.ndarray:
        return np.sort(distances(features, features), axis=1)[:, 3]

    found = distances(reference, samples)
    precision = (found <= radii(reference)[:, None]).any(axis=0).mean()
    return float(precision), float((found <= radii(samples)[None]).any(axis=1).mean())


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("offset", [0, 3000])
def test_precision_and_recall(block, offset):
    # With the offset squared norms are a million times the distances, which float32 would lose.
    rng = np.random.default_rng(2)
    reference = (rng.normal(size=(60, 5)) + offset).astype(np.float32)
    samples = (1.5 * rng.normal(size=(75, 5)) + 0.4 + offset).astype(np.float32)
    found = precision_recall(reference, samples, CPU, block)
    assert found == plain_precision_recall(reference, samples)
    assert 0.3 < found.precision < 0.99 and 0.3 < found.recall < 0.99 and found.precision != found.recall


def test_copies_are_at_no_distance():
    # Balls of radius 0: the reference has every image four times over, and half of the samples are copies of them.
    rng = np.random.default_rng(3)
    reference = np.tile(rng.normal(size=(9, 64)), (4, 1)).astype(np.float32) * 50
    samples = np.concatenate([reference[:9], rng.normal(size=(9, 64)).astype(np.float32) * 50])
    assert precision_recall(reference, samples, CPU, 8).precision == 0.5
    assert precision_recall(reference, samples, CPU, 8) == plain_precision_recall(reference, samples)
    assert precision_recall(reference, reference, CPU) == (1, 1)
    with pytest.raises(ValueError, match="3 images have no third nearest neighbour"):
        precision_recall(reference, samples[:3], CPU)


def activations(number: int, seed: int = 0) -> Activations:
    generator = torch.Generator().manual_seed(seed)
    return Activations(*(torch.randn(number, size, generator=generator) for size in (20, 30, 40)))


@pytest.fixture
def _few_features(monkeypatch):
    monkeypatch.setattr(features, "NUM_FEATURES", 20)
    monkeypatch.setattr(features, "NUM_SPATIAL_FEATURES", 30)


def part_of(found: Activations, positions: list[int]) -> ImageFeatures:
    part = ImageFeatures("a" * 64, (8, 8), CPU)
    for place in positions:
        part.add(Activations(*(values[[place]] for values in found)), np.array([place]))
    return part


@pytest.mark.usefixtures("_few_features")
def test_parts_of_ranks_are_the_set_in_a_fixed_order():
    found = activations(5)
    whole = ImageFeatures.joined([part_of(found, [4, 0, 2]), part_of(found, [1, 3])])
    assert len(whole) == 5
    assert np.array_equal(whole.rows(), found.pool.numpy())
    for statistics, values in ((whole.pool, found.pool.double()), (whole.spatial, found.spatial.double())):
        mean, covariance = statistics.moments()
        assert np.allclose(mean, values.mean(dim=0), rtol=0, atol=1e-12)
        assert np.allclose(covariance, np.cov(values, rowvar=False), rtol=0, atol=1e-12)
    assert whole.score.score() == pytest.approx(plain_inception_score(found.logits.numpy(), 5), rel=1e-12)


@pytest.mark.usefixtures("_few_features")
def test_parts_that_are_no_set_are_refused():
    found = activations(5)
    with pytest.raises(DataError, match=r"4 images should have the positions 0 to 3.*around 1 one is missing or there"):
        ImageFeatures.joined([part_of(found, [0, 1]), part_of(found, [1, 2])])
    with pytest.raises(DataError, match=r"around 4 one is missing"):
        ImageFeatures.joined([part_of(found, [0, 1]), part_of(found, [2, 4])])
    other = part_of(found, [1])
    other.network = "b" * 64
    with pytest.raises(DataError, match=r"network a{12}, and of .* b{12}; join parts of one set"):
        ImageFeatures.joined([part_of(found, [0]), other])
    found.logits[2, 7] = torch.nan
    with pytest.raises(DataError, match="images 2 to 2: the Inception network gives NaN"):
        part_of(found, [2])
