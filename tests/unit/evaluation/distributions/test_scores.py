"""Scores of samples against references of every kind, with a network of few features; files that are no reference."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from PIL import Image

from bitdance_scale.errors import CheckpointError, DataError
from bitdance_scale.evaluation.distributions.features import collect
from bitdance_scale.evaluation.distributions.image_sets import NpzImages
from bitdance_scale.evaluation.distributions.reference import (
    check_reference,
    make_reference,
    read_reference,
    save_reference,
)
from bitdance_scale.evaluation.distributions.scores import compare
from tests.unit.evaluation.distributions.small_network import POOL, SPATIAL, SmallNetwork, use_few_features

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_features(monkeypatch):
    use_few_features(monkeypatch)


def noise(number: int, seed: int, top: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (number, 4, 4, 3), dtype=np.uint8)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + np.trace(sum(covariances) - 2 * root))


def test_scores_are_the_formulas_and_every_kind_of_reference_gives_them(tmp_path):
    network, real, drawn = SmallNetwork(), noise(40, 0), noise(30, 1, 230)
    np.savez(tmp_path / "real.npz", real)
    (tmp_path / "real").mkdir()
    for place, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / "real" / f"{place:03d}.png")
    np.savez_compressed(tmp_path / "drawn.npz", drawn)
    samples = collect(NpzImages(tmp_path / "drawn.npz", 7), network)
    of_images = read_reference(tmp_path / "real.npz", network)
    save_reference(tmp_path / "saved", of_images)
    found = compare(samples, of_images, CPU)
    assert compare(samples, read_reference(tmp_path / "real", network), CPU) == found
    assert compare(samples, read_reference(tmp_path / "saved", network), CPU) == found

    theirs, ours = ([part.double().numpy() for part in network.activations(images)] for images in (real, drawn))
    assert found.fid == pytest.approx(frechet(ours[0], theirs[0]), rel=1e-9)
    assert found.sfid == pytest.approx(frechet(ours[1], theirs[1]), rel=1e-9)
    p = scipy.special.softmax(ours[2], axis=1)
    parts = [np.exp(scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()) for part in (p[:20], p[20:])]
    assert found.inception_score == pytest.approx(np.mean(parts), rel=1e-9)
    assert 0 < found.precision <= 1 and 0 < found.recall <= 1
    assert (found.num_images, found.reference_images, found.reference_rows) == (30, 40, 40)
    assert any("of 30 samples; these scores are reported of 50000" in note for note in found.notes)
    assert "the reference is of 40 images" in found.notes


def test_a_reference_of_adms_layout(tmp_path):
    # Statistics of the whole data set, and some of its images for precision and recall.
    network, real, drawn = SmallNetwork(), noise(40, 0), noise(30, 1)
    whole = make_reference(collect([real], network), "all")
    moments = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*whole.pool, *whole.spatial), strict=True))
    np.savez(tmp_path / "adm.npz", arr_0=real[:9], **moments)
    samples = collect([drawn], network)
    found, of_all = compare(samples, read_reference(tmp_path / "adm.npz", network), CPU), compare(samples, whole, CPU)
    assert (found.fid, found.sfid) == (of_all.fid, of_all.sfid)
    few = compare(samples, make_reference(collect([real[:9]], network), "few"), CPU)
    assert (found.precision, found.recall) == (few.precision, few.recall)
    assert (found.reference_images, found.reference_rows) == (None, 9)

    np.savez(tmp_path / "fid.npz", mu=moments["mu"], sigma=moments["sigma"])
    bare = compare(samples, read_reference(tmp_path / "fid.npz", network), CPU)
    assert (bare.fid, bare.sfid, bare.precision, bare.recall) == (of_all.fid, None, None, None)
    assert [note[:16] for note in bare.notes[1:3]] == ["no sFID: the ref", "no precision and"]
    with pytest.raises(DataError, match="does not say of how many images"):
        save_reference(tmp_path / "again.npz", read_reference(tmp_path / "adm.npz", network))


def test_samples_sorted_by_class_are_noted():
    network = SmallNetwork()
    images = np.concatenate([noise(20, 0, 256) // 8, 255 - noise(20, 1, 256) // 8])
    against = make_reference(collect([noise(40, 2)], network), "real")
    notes = compare(collect([images], network), against, CPU).notes
    assert any("parts of 5,000 in the order of the samples differ" in note for note in notes)
    mixed = images.reshape(2, 20, 4, 4, 3).swapaxes(0, 1).reshape(images.shape)
    notes = compare(collect([mixed], network), against, CPU).notes
    assert not any("order of the samples" in note for note in notes)


def test_what_does_not_belong_together_is_refused(tmp_path):
    network, samples = SmallNetwork(), collect([noise(9, 1)], SmallNetwork())
    of_images = make_reference(collect([noise(9, 0)], network), "real")
    save_reference(tmp_path / "a.npz", of_images)
    with pytest.raises(CheckpointError, match=r"a.npz: was made with other weights .* a{12}\) than these \(b{12}\)"):
        read_reference(tmp_path / "a.npz", SmallNetwork("b" * 64))
    with pytest.raises(CheckpointError, match="real: was made with other weights"):
        compare(collect([noise(9, 1)], SmallNetwork("b" * 64)), of_images, CPU)
    tall = make_reference(collect([noise(9, 0).reshape(9, 8, 2, 3)], network), "tall.npz")
    with pytest.raises(DataError, match=r"tall.npz: its images are of 2 x 8 px and the samples of 4 x 4 px"):
        compare(samples, tall, CPU)
    with pytest.raises(DataError, match=r"image 9 is of 2 x 8 px, those before it of 4 x 4"):
        collect([noise(9, 0), noise(9, 0).reshape(9, 8, 2, 3)], network)
    with pytest.raises(DataError, match=r"images from number 9 are float64 \[9, 4, 4, 3\], expected uint8"):
        collect([noise(9, 0), noise(9, 0) / 255], network)
    with pytest.raises(DataError, match="1 images have no distribution to compare; there must be at least 2"):
        collect([noise(1, 0)], network)
    few = compare(collect([noise(3, 1)], network), of_images, CPU)
    assert few.precision is None and few.fid > 0


def test_files_that_are_no_reference(tmp_path):
    path, mean, covariance = tmp_path / "a.npz", np.zeros(POOL), np.eye(POOL)
    wrong = [
        (
            {"mu": np.zeros(64), "sigma": np.eye(64)},
            r"mu is float64 \[64\], expected floats \[6\]: statistics of another",
        ),
        ({"mu": mean}, r"sigma is missing, expected floats \[6, 6\]"),
        ({"mu": mean.astype(int), "sigma": covariance}, r"mu is int64 \[6\], expected floats"),
        ({"mu": mean, "sigma": covariance, "mu_s": np.zeros(SPATIAL)}, r"sigma_s is missing"),
        ({"x": mean}, r"holds x, and neither images \(arr_0\) nor statistics"),
        ({"mu": mean, "sigma": covariance, "rows": np.zeros((9, POOL))}, r"is not what was saved as a reference"),
        ({"arr_0": noise(4, 0).astype(int)}, r"arr_0 is int64 \[4, 4, 4, 3\], expected uint8"),
    ]
    for arrays, problem in wrong:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=rf"a.npz: {problem}"):
            check_reference(path)
    for arrays, problem in [
        ({"mu": mean + np.nan, "sigma": covariance}, "mu or sigma holds NaN"),
        ({"mu": mean, "sigma": np.triu(np.ones((POOL, POOL)))}, "sigma is no covariance"),
        ({"mu": mean, "sigma": -covariance}, "sigma is no covariance"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=rf"a.npz: {problem}"):
            read_reference(path, SmallNetwork())
    with pytest.raises(DataError, match="there is no such folder or .npz of a reference"):
        check_reference(tmp_path / "missing.npz")
    with pytest.raises(DataError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        check_reference(tmp_path / "empty")
