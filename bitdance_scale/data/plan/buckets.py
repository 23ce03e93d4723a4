"""Which image size an image is trained at, in each resolution.

A class draws from *every* image large enough for one of its buckets, so one image may be trained in several resolutions.
The alternative, one class per image, would starve the small resolutions of all large images (most of the data) and tie the
mix to the data set; the paper's mix by image count (2:7:1) is a property of the batch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitdance_scale.config.schema import Resolution
from bitdance_scale.data.image_decode import MAX_IMAGE_PIXELS

SAMPLES_PER_CHUNK = 1 << 20
_GROUP_BITS = 512


def resolution_buckets(resolution: Resolution) -> np.ndarray:
    """int32 [B, 2], the (height, width) in pixels of the class's buckets and of their transposes, each once."""
    buckets = [size for height, width in resolution.buckets_px for size in ((height, width), (width, height))]
    return np.array(list(dict.fromkeys(buckets)), dtype=np.int32)


def assign_buckets(height_px: np.ndarray, width_px: np.ndarray, buckets: np.ndarray, max_upscale: float) -> np.ndarray:
    """The bucket nearest in aspect among those that an image covers when enlarged at most `max_upscale` times.

    Nearest by the ratio of the aspects, the larger over the smaller; of equals, the first. Images of more pixels than
    the decoder accepts go nowhere.

    Args:
        height_px, width_px: [N], stored sizes.
        buckets: [B, 2], as `resolution_buckets` gives them.
        max_upscale: greatest enlargement; 1 allows none.

    Returns:
        int16 [N], row in `buckets`, or -1.
    """
    heights, widths = height_px.astype(np.float64), width_px.astype(np.float64)
    best = np.full(len(heights), -1, dtype=np.int16)
    best_distance = np.full(len(heights), np.inf)
    is_decodable = heights * widths <= MAX_IMAGE_PIXELS
    for row, (bucket_height, bucket_width) in enumerate(buckets.tolist()):
        # Products of integers and one division are rounded alike on every machine, which logarithms are not; a bucket
        # and its transpose tie exactly for a square image.
        wide, tall = widths * bucket_height, heights * bucket_width
        distance = np.maximum(wide, tall) / np.minimum(wide, tall)
        is_covered = (heights * max_upscale >= bucket_height) & (widths * max_upscale >= bucket_width)
        is_better = is_decodable & is_covered & (distance < best_distance)
        best[is_better] = row
        best_distance[is_better] = distance[is_better]
    return best


class EligibleSamples:
    """The samples that a class can draw, as a bitmap: N / 8 bytes, so that 500 M samples take 63 MB.

    Args:
        num_samples: N.
        is_eligible: tells it of a range of them, bool [n]; asked in chunks.
    """

    def __init__(self, num_samples: int, is_eligible: Callable[[slice], np.ndarray]) -> None:
        chunks = [
            np.packbits(is_eligible(slice(start, min(start + SAMPLES_PER_CHUNK, num_samples))))
            for start in range(0, num_samples, SAMPLES_PER_CHUNK)
        ]
        bitmap = np.concatenate([*chunks, np.zeros(0, dtype=np.uint8)])
        bitmap = np.pad(bitmap, (0, -len(bitmap) % (_GROUP_BITS // 8)))
        self._groups = bitmap.reshape(-1, _GROUP_BITS // 8)
        # Eligible samples before each group; the last entry is their number.
        self._before = np.concatenate([[0], np.cumsum(np.bitwise_count(self._groups).sum(axis=1, dtype=np.int64))])

    def __len__(self) -> int:
        return int(self._before[-1])

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """int64 [n], positions in the index of the eligible samples number `ranks` [n], 0 <= rank < len(self)."""
        group = np.searchsorted(self._before, ranks, side="right") - 1
        bits = np.unpackbits(self._groups[group], axis=1)
        is_reached = np.cumsum(bits, axis=1, dtype=np.int16) > (ranks - self._before[group])[:, None]
        return group * _GROUP_BITS + is_reached.argmax(axis=1)
