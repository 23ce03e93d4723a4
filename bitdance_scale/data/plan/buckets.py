"""The size at which a resolution trains an image: the picture, its bucket, and the samples that have a bucket.

A resolution draws from *every* image that is large enough for one of its buckets, so an image may be trained in several
resolutions. With one resolution per image, the small resolutions would never see large images (most of the data), and
the mix would depend on the data set. The paper's mix by image count (2:7:1) is a property of the batch alone.

The picture is not always the whole stored image: img2dataset may have padded it to a square (`resize_mode=border`).
LAION-400M at 256 px is stored like this: the image is scaled to the square along its longer side, and white is added on
both sides of the other. The original size tells how much.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitdance_scale.config.schema import Resolution
from bitdance_scale.data.images.limits import MAX_IMAGE_PIXELS
from bitdance_scale.data.index.index import Index

SAMPLES_PER_CHUNK = 1 << 20
_GROUP_BITS = 512
_INSET_PX = 1
"""Cropped in addition to the border, because compression blurs the edge by one pixel."""


def content_px(index: Index, samples: np.ndarray | slice, has_borders: bool) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the picture inside each stored image, int [n] each.

    Args:
        index: the data set.
        samples: positions in it.
        has_borders: whether img2dataset padded the images. If not, or if the original size of an image is not known,
            the picture is the whole image.
    """
    height, width = index.height_px[samples], index.width_px[samples]
    if not has_borders:
        return height, width
    original = index.original_height_px[samples].astype(np.int64), index.original_width_px[samples].astype(np.int64)
    is_known = (height == width) & (np.minimum(*original) > 0) & (original[0] != original[1])
    longest = np.where(is_known, np.maximum(*original), 1)
    sides = []
    for stored, side in zip((height, width), original, strict=True):
        # img2dataset rounds halves to the even neighbour.
        scaled = np.rint(side * (stored / longest)).astype(np.int64)
        inside = np.maximum(np.where(scaled < stored, scaled - 2 * _INSET_PX, stored), 1)
        sides.append(np.where(is_known, inside, stored).astype(np.int32))
    return sides[0], sides[1]


def resolution_buckets(resolution: Resolution) -> np.ndarray:
    """int32 [B, 2], (height, width) in pixels of the buckets of a resolution and of their transposes, each once."""
    buckets = [size for height, width in resolution.buckets_px for size in ((height, width), (width, height))]
    return np.array(list(dict.fromkeys(buckets)), dtype=np.int32)


def assign_buckets(height_px: np.ndarray, width_px: np.ndarray, buckets: np.ndarray, max_upscale: float) -> np.ndarray:
    """For each image the bucket nearest in aspect among those it covers when enlarged at most `max_upscale` times.

    The distance of two aspects is the larger over the smaller; of equal distances the first bucket wins. Images with
    more pixels than the decoder accepts get no bucket.

    Args:
        height_px: [N], heights of the pictures.
        width_px: [N], widths of the pictures.
        buckets: [B, 2], as `resolution_buckets` gives them.
        max_upscale: largest enlargement; 1 allows none.

    Returns:
        int16 [N], row in `buckets`, or -1.
    """
    heights, widths = height_px.astype(np.float64), width_px.astype(np.float64)
    best = np.full(len(heights), -1, dtype=np.int16)
    best_distance = np.full(len(heights), np.inf)
    is_decodable = heights * widths <= MAX_IMAGE_PIXELS
    for row, (bucket_height, bucket_width) in enumerate(buckets.tolist()):
        # Products of integers and one division round the same on every machine; logarithms do not. A bucket and its
        # transpose tie exactly for a square image.
        wide, tall = widths * bucket_height, heights * bucket_width
        distance = np.maximum(wide, tall) / np.minimum(wide, tall)
        is_covered = (heights * max_upscale >= bucket_height) & (widths * max_upscale >= bucket_width)
        is_better = is_decodable & is_covered & (distance < best_distance)
        best[is_better] = row
        best_distance[is_better] = distance[is_better]
    return best


class EligibleSamples:
    """The samples that a resolution can draw, as a bitmap of N / 8 bytes: 500 M samples take 63 MB.

    Args:
        num_samples: N.
        is_eligible: whether each sample of a range is eligible, bool [n]; called once per chunk.
    """

    def __init__(self, num_samples: int, is_eligible: Callable[[slice], np.ndarray]) -> None:
        chunks = [
            np.packbits(is_eligible(slice(start, min(start + SAMPLES_PER_CHUNK, num_samples))))
            for start in range(0, num_samples, SAMPLES_PER_CHUNK)
        ]
        bitmap = np.concatenate([*chunks, np.zeros(0, dtype=np.uint8)])
        bitmap = np.pad(bitmap, (0, -len(bitmap) % (_GROUP_BITS // 8)))
        self._groups = bitmap.reshape(-1, _GROUP_BITS // 8)
        # Eligible samples before each group; the last entry counts all.
        self._before = np.concatenate([[0], np.cumsum(np.bitwise_count(self._groups).sum(axis=1, dtype=np.int64))])

    def __len__(self) -> int:
        return int(self._before[-1])

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """int64 [n], positions of the eligible samples with the numbers `ranks` [n], 0 <= rank < len(self)."""
        group = np.searchsorted(self._before, ranks, side="right") - 1
        bits = np.unpackbits(self._groups[group], axis=1)
        is_reached = np.cumsum(bits, axis=1, dtype=np.int16) > (ranks - self._before[group])[:, None]
        return group * _GROUP_BITS + is_reached.argmax(axis=1)
