"""The size at which a resolution trains an image: the picture, its bucket, and the samples that have a bucket.

A resolution draws from *every* image that is large enough for one of its buckets, so an image may be trained in several
resolutions. With one resolution per image, the small resolutions would never see large images (most of the data), and
the mix would depend on the data set. The paper's mix by image count (2:7:1) is a property of the batch alone.

The picture is not always the whole stored image: img2dataset may have padded it to a square (`resize_mode=border`).
LAION-400M at 256 px is stored like this: the image is scaled to the square along its longer side, and white is added on
both sides of the other. The original size tells how much.
"""

from __future__ import annotations

import numpy as np

from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.data.images.limits import MAX_IMAGE_PIXELS
from bitdance_scale.data.index.index import Index

_GROUP_BITS = 512
_INSET_PX = 1
"""Cropped in addition to the border, because compression blurs the edge by one pixel."""


def content_px(index: Index, samples: np.ndarray | slice, has_borders: bool) -> np.ndarray:
    """int32 [n, 2], (height, width) of the picture inside each stored image.

    Args:
        index: the data set.
        samples: positions in it.
        has_borders: whether img2dataset padded the images. If not, or if the original size of an image is not known,
            the picture is the whole image.
    """
    stored = index.sizes_px(samples)
    if not has_borders:
        return stored
    original = index.original_sizes_px(samples).astype(np.int64)
    is_known = (stored[:, 0] == stored[:, 1]) & (original.min(axis=1) > 0) & (original[:, 0] != original[:, 1])
    longest = np.where(is_known, original.max(axis=1), 1)
    # img2dataset rounds halves to the even neighbour.
    scaled = np.rint(original * (stored / longest[:, None])).astype(np.int64)
    inside = np.maximum(np.where(scaled < stored, scaled - 2 * _INSET_PX, stored), 1)
    return np.where(is_known[:, None], inside, stored).astype(np.int32)


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


class Staircase:
    """Which images cover some bucket of a resolution: the same as `assign_buckets(..) >= 0`, several times as fast.

    Whether an image covers a bucket grows with both sides. So the images that cover one lie above a staircase, of which
    only the corners are kept, as whole pixels.

    Args:
        buckets: [B, 2], as `resolution_buckets` gives them.
        max_upscale: largest enlargement.
    """

    def __init__(self, buckets: np.ndarray, max_upscale: float) -> None:
        # Rounded as assign_buckets rounds; the first side that covers.
        scaled = np.arange(1 << 16, dtype=np.float64) * max_upscale
        corners = [tuple(np.searchsorted(scaled, bucket).tolist()) for bucket in buckets]
        self._corners = [
            (height, width)
            for height, width in dict.fromkeys(corners)
            if max(height, width) < 1 << 16
            and not any(h <= height and w <= width for h, w in corners if (h, w) != (height, width))
        ]

    def covers(self, height_px: np.ndarray, width_px: np.ndarray) -> np.ndarray:
        """Bool [n], for sides uint16 [n]."""
        covered = np.zeros(len(height_px), bool)
        for height, width in self._corners:
            covered |= (height_px >= height) & (width_px >= width)
        if len(height_px) and int(height_px.max()) * int(width_px.max()) > MAX_IMAGE_PIXELS:
            covered &= height_px.astype(np.int64) * width_px <= MAX_IMAGE_PIXELS
        return covered


class EligibleSamples:
    """The samples that a stream can draw, as a bitmap of N / 8 bytes: 500 M samples take 63 MB.

    Args:
        groups: uint8 [G, 64], one bit per sample, 512 in a row; bits after the last sample are 0.
        before: int64 [G + 1], eligible samples before each row; the last entry counts all.

    Attributes:
        groups, before: as given.
    """

    def __init__(self, groups: np.ndarray, before: np.ndarray) -> None:
        self.groups, self.before = groups, before

    @classmethod
    def of_bits(cls, bitmap: np.ndarray) -> EligibleSamples:
        """From uint8 [N / 8 rounded up], as `np.packbits` gives it."""
        groups = np.pad(bitmap.astype(np.uint8), (0, -len(bitmap) % (_GROUP_BITS // 8))).reshape(-1, _GROUP_BITS // 8)
        counts = np.bitwise_count(groups).sum(axis=1, dtype=np.int64)
        return cls(groups, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))

    def __len__(self) -> int:
        return int(self.before[-1])

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """int64 [n], positions of the eligible samples with the numbers `ranks` [n], 0 <= rank < len(self)."""
        group = np.searchsorted(self.before, ranks, side="right") - 1
        bits = np.unpackbits(self.groups[group], axis=1)
        is_reached = np.cumsum(bits, axis=1, dtype=np.int16) > (ranks - self.before[group])[:, None]
        return group * _GROUP_BITS + is_reached.argmax(axis=1)

    def contains(self, numbers: np.ndarray) -> np.ndarray:
        """Bool [n], whether samples int64 [n] are eligible."""
        octets = self.groups.reshape(-1)[numbers >> 3]
        return (octets >> (7 - (numbers & 7)).astype(np.uint8)) & 1 == 1
