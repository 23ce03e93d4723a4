"""What is kept of images as they come, and how the parts of several ranks are joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.distributions.inception_score import ScoreSums
from bitdance_scale.evaluation.frechet import FeatureStatistics
from bitdance_scale.evaluation.inception import NUM_FEATURES, NUM_SPATIAL_FEATURES, Activations, Inception


class ImageFeatures:
    """Of a set of images, or of those of one rank: all that its scores need. It can be pickled.

    Args:
        network: digest of the network's weights.
        size_px: (height, width) of the images.
        device: where sums are.
        keeps_rows: whether the features of every image are kept, 8 kB each, for precision and recall.

    Attributes:
        pool: mean and covariance of the last pooling, for FID.
        spatial: those of the spatial features, for sFID.
        score: sums for the Inception Score.
    """

    def __init__(self, network: str, size_px: tuple[int, int], device: torch.device, keeps_rows: bool = True) -> None:
        self.network, self.size_px, self.keeps_rows = network, size_px, keeps_rows
        self.pool = FeatureStatistics(NUM_FEATURES, device)
        self.spatial = FeatureStatistics(NUM_SPATIAL_FEATURES, device)
        self.score = ScoreSums()
        self._positions: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def __len__(self) -> int:
        """Number of images."""
        return sum(map(len, self._positions))

    def add(self, activations: Activations, positions: np.ndarray) -> None:
        """Counts images in.

        Args:
            activations: of n images.
            positions: int64 [n], where the images are in the order of all, from 0; the same on any number of ranks.

        Raises:
            DataError: an activation is no finite number.
        """
        if not all(values.isfinite().all() for values in activations):
            raise DataError(
                f"images {positions.min()} to {positions.max()}: the Inception network gives NaN or infinity for them; "
                "check its weights, and the memory of this device"
            )
        self.pool.add(activations.pool)
        self.spatial.add(activations.spatial)
        self.score.add(activations.logits, positions)
        self._positions.append(np.array(positions, dtype=np.int64))
        if self.keeps_rows:
            self._rows.append(activations.pool.float().cpu().numpy())

    def rows(self) -> np.ndarray | None:
        """Pool features float32 [N, 2048] in the order of positions; None where they were not kept."""
        if not self.keeps_rows:
            return None
        if not self._rows:
            return np.zeros((0, NUM_FEATURES), dtype=np.float32)
        return np.concatenate(self._rows)[np.argsort(np.concatenate(self._positions), kind="stable")]

    @classmethod
    def joined(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """One set of the parts of all ranks, which stay as they are.

        Rows are in the order of positions and sums are added up in the order of `parts`, in float64.

        Raises:
            DataError: parts are of other networks or sizes, or the positions are not those of 0 to N - 1, once each.
        """
        first = parts[0]
        odd = [part for part in parts if (part.network, part.size_px) != (first.network, first.size_px)]
        if odd:
            raise DataError(
                f"parts of one set of images are of {first.size_px} px and network {first.network[:12]}, and of "
                f"{odd[0].size_px} px and {odd[0].network[:12]}; join parts of one set, with the same weights"
            )
        whole = cls(first.network, first.size_px, first.pool.sums.device, all(part.keeps_rows for part in parts))
        for part in parts:
            whole.pool.sums += part.pool.sums.to(whole.pool.sums.device)
            whole.spatial.sums += part.spatial.sums.to(whole.spatial.sums.device)
            whole.score.join(part.score)
            whole._positions += part._positions
            whole._rows += part._rows if whole.keeps_rows else []
        whole.check_positions()
        return whole

    def check_positions(self) -> None:
        """Refuses a set with an image missing, or twice; errors as `joined`."""
        number = len(self)
        found = np.sort(np.concatenate(self._positions)) if self._positions else np.zeros(0, dtype=np.int64)
        wrong = np.flatnonzero(found != np.arange(number))
        if len(wrong):
            raise DataError(
                f"{number} images should have the positions 0 to {number - 1}, once each; around {found[wrong[0]]} one "
                "is missing or there twice. Give every image of the set to one rank"
            )


def collect(batches: Iterable[np.ndarray], inception: Inception, keeps_rows: bool = True) -> ImageFeatures:
    """The features of images in the order in which they come, on the device of the network.

    Args:
        batches: uint8 [n, H, W, 3] each; all of one size.
        inception: the network.
        keeps_rows: as of `ImageFeatures`.

    Raises:
        DataError: a batch is of another kind or size than the first, or there are fewer than 2 images.
    """
    device = next(inception.parameters()).device
    features: ImageFeatures | None = None
    number = 0
    for images in batches:
        check_images(images, number)
        size_px = (images.shape[1], images.shape[2])
        if features is None:
            features = ImageFeatures(inception.digest, size_px, device, keeps_rows)
        if size_px != features.size_px:
            raise DataError(
                f"image {number} is of {size_px[1]} x {size_px[0]} px, those before it of "
                f"{features.size_px[1]} x {features.size_px[0]}; a set is of one size, as its resize to 299 px matters"
            )
        features.add(inception.activations(images), np.arange(number, number + len(images)))
        number += len(images)
    if features is None or number < 2:
        raise DataError(f"{number} images have no distribution to compare; there must be at least 2")
    return features


def check_images(images: np.ndarray, first: int = 0) -> None:
    """Refuses a batch that is not uint8 [n, H, W, 3] with n > 0.

    Args:
        images: the batch.
        first: position of its first image, for the error.

    Raises:
        DataError: as said.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise DataError(
            f"images from number {first} are {images.dtype} {list(images.shape)}, expected uint8 [n, H, W, 3]; "
            "bring them to RGB of 8 bits per channel"
        )
