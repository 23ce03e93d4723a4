"""PSNR and SSIM of uint8 images, as scikit-image computes them; this is the only file that imports it."""

from __future__ import annotations

import numpy as np

from bitdance_scale.config.tokenizer_schema import SSIM_PX

_MAX_PSNR_DB = 100.0


def psnr_db(decoded: np.ndarray, images: np.ndarray) -> np.ndarray:
    """float64 [n], peak signal-to-noise ratio of uint8 images [n, H, W, 3] in dB, with 255 as the peak.

    No image counts for more than 100 dB, and an identical one for so much, so that there is a mean over images.
    """
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        values = [peak_signal_noise_ratio(*pair, data_range=255) for pair in zip(images, decoded, strict=True)]
    return np.minimum(np.array(values, dtype=np.float64), _MAX_PSNR_DB)


def ssim(decoded: np.ndarray, images: np.ndarray) -> np.ndarray:
    """float64 [n], structural similarity of uint8 images [n, H, W, 3].

    Every position has the same weight in windows of 7 x 7, covariances are divided by 48, and only whole windows count;
    K1 = 0.01, K2 = 0.03 and a range of 255. The mean over windows, then over the three colours.

    Raises:
        ValueError: a side is shorter than a window.
    """
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(*pair, data_range=255, channel_axis=-1, win_size=SSIM_PX, gaussian_weights=False)
        for pair in zip(images, decoded, strict=True)
    ]
    return np.array(values, dtype=np.float64)
