import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bitdance_scale.evaluation.pixels import psnr_db, ssim


def pairs(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two smooth pictures and worse copies of them, one hardly changed."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:height, :width]
    smooth = 127 + 90 * np.sin(rows / 3)[..., None] * np.cos(columns[..., None] / np.array([2, 3, 5]))
    images = np.stack([smooth, smooth[::-1]]).round().astype(np.uint8)
    noise = rng.normal(0, 1, images.shape) * np.array([25, 1])[:, None, None, None]
    return images, (images + noise).clip(0, 255).astype(np.uint8)


def written_out_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of Wang et al. (2004) over all whole 7 x 7 windows, with the sample covariance."""
    found = []
    for channel in range(3):
        for top in range(x.shape[0] - 6):
            for left in range(x.shape[1] - 6):
                a, b = (z[top : top + 7, left : left + 7, channel].astype(np.float64).ravel() for z in (x, y))
                covariance = np.cov(a, b)
                mean_a, mean_b, c1, c2 = a.mean(), b.mean(), (0.01 * 255) ** 2, (0.03 * 255) ** 2
                found.append(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance[0, 1] + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2))
                )
    return float(np.mean(found))


def test_ssim_is_the_formula_and_what_skimage_has_by_default():
    images, decoded = pairs(11, 14)
    expected = [written_out_ssim(*pair) for pair in zip(images, decoded, strict=True)]
    assert ssim(decoded, images) == pytest.approx(expected, rel=1e-9)
    assert 0.1 < expected[0] < 0.9 < expected[1] < 1
    by_default = [structural_similarity(*pair, channel_axis=-1) for pair in zip(images, decoded, strict=True)]
    assert ssim(decoded, images).tolist() == by_default


def test_psnr_is_the_formula_and_what_skimage_has():
    images, decoded = pairs(11, 14)
    errors = np.square(images.astype(np.float64) - decoded).mean(axis=(1, 2, 3))
    assert psnr_db(decoded, images) == pytest.approx(10 * np.log10(255**2 / errors), rel=1e-12)
    expected = [peak_signal_noise_ratio(*pair) for pair in zip(images, decoded, strict=True)]
    assert psnr_db(decoded, images).tolist() == expected
    assert psnr_db(images, images).tolist() == [100.0, 100.0]
