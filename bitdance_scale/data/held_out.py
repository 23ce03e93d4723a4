"""Held-out images in batches of equal size, each once, shared out over the ranks of a job.

Which images are in a batch does not depend on the number of ranks, so that what is computed of a batch does not either.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.image_decode import decode_image, read_size_px
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.errors import DataError

_BATCHES_AHEAD = 2
_THREADS = 4


@dataclass(frozen=True)
class HeldOutSize:
    """One size at which images are looked at.

    Attributes:
        crop_px: (height, width) of a centre crop, of the image scaled to cover it and never enlarged; None: the whole
            image, not scaled, cut to sides that `multiple` divides.
        multiple: what divides the sides.
        min_px: shortest side that is allowed.
    """

    crop_px: tuple[int, int] | None
    multiple: int = 1
    min_px: int = 1

    @property
    def name(self) -> str:
        """As tables call it."""
        return "original" if self.crop_px is None else f"{self.crop_px[0]} x {self.crop_px[1]}"


@dataclass(frozen=True)
class HeldOutBatch:
    """Images of one size.

    Attributes:
        samples: their positions in the index.
        images: uint8 [n, H, W, 3].
    """

    samples: tuple[int, ...]
    images: np.ndarray


class HeldOutImages:
    """The images of one size.

    Args:
        index: the data set.
        size: the size.
        num_images: takes the first so many that are large enough; None: all.
        batch_px: pixels of a batch; one image may have more.

    Attributes:
        size: the size.
        samples: int64 [n], the images, by their positions in the index.
        left_out: int64 [m], those that were passed over because they are too small.

    Raises:
        DataError: no image is large enough.
    """

    def __init__(self, index: Index, size: HeldOutSize, num_images: int | None, batch_px: int) -> None:
        self._index, self.size = index, size
        stored = index.sizes_px(slice(None))
        crop = size.crop_px
        sizes = stored // size.multiple * size.multiple if crop is None else np.broadcast_to(crop, stored.shape)
        fits = (sizes >= size.min_px).all(axis=1) & (stored >= sizes).all(axis=1)
        # Statistics over the cells of an image need two of them.
        fits &= sizes.prod(axis=1) >= 2 * size.multiple**2
        self.samples = np.flatnonzero(fits)[:num_images]
        if not len(self.samples):
            needed = f"has sides of {size.min_px} px" if crop is None else f"covers a crop of {size.name} px"
            height, width = stored.max(axis=0).tolist()
            raise DataError(
                f"{index.shards[0].path} (first of {len(index.shards)} shards): none of {len(index)} images {needed}; "
                f"the largest sides are {height} x {width} px. Remove this size or add larger images."
            )
        num_seen = len(index) if num_images is None or len(self.samples) < num_images else self.samples[-1] + 1
        self.left_out = np.flatnonzero(~fits[:num_seen])
        self._batches = _equal_batches(self.samples, sizes[self.samples], batch_px)

    def batches(self, rank: int, num_ranks: int) -> Iterator[HeldOutBatch]:
        """The batches of one rank, read ahead in threads.

        Raises:
            DataError: an image cannot be read.
        """
        reader = ShardReader()
        ahead: deque[list[tuple[int, Future[np.ndarray]]]] = deque()
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="held_out")
        try:
            for batch in self._batches[rank::num_ranks]:
                ahead.append([(sample, pool.submit(self._read, reader, sample)) for sample in batch.tolist()])
                if len(ahead) > _BATCHES_AHEAD:
                    yield from self._collect(ahead.popleft())
            while ahead:
                yield from self._collect(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
            reader.close()

    def _read(self, reader: ShardReader, sample: int) -> np.ndarray:
        data, stored_px = reader.image(self._index, sample), self._index.size_px(sample)
        if self.size.crop_px is not None:
            return decode_image(data, stored_px, self.size.crop_px)
        upright_px = read_size_px(data)
        pixels = decode_image(data, stored_px, upright_px)
        height, width = (side // self.size.multiple * self.size.multiple for side in upright_px)
        top, left = (upright_px[0] - height) // 2, (upright_px[1] - width) // 2
        return pixels[top : top + height, left : left + width]

    def _collect(self, tasks: Sequence[tuple[int, Future[np.ndarray]]]) -> Iterator[HeldOutBatch]:
        by_shape: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for sample, future in tasks:
            try:
                image = future.result()
            except SampleError as error:
                raise DataError(
                    f"{self._index.shard_path(sample)}: sample {self._index.name(sample)}: {error}. Held-out images "
                    "must be readable: repair the shard or remove it."
                ) from error
            # The index may have the sides of a turned picture the other way round.
            by_shape.setdefault(image.shape, []).append((sample, image))
        for found in by_shape.values():
            yield HeldOutBatch(tuple(sample for sample, _ in found), np.stack([image for _, image in found]))


def centre_crops(index: Index, crop_px: tuple[int, int], num_images: int) -> np.ndarray:
    """uint8 [n, height, width, 3], centre crops of the first `num_images` images that are large enough, or of all.

    Raises:
        DataError: no image is large enough, or one of them cannot be read.
    """
    images = HeldOutImages(index, HeldOutSize(crop_px), num_images, math.prod(crop_px))
    return np.concatenate([batch.images for batch in images.batches(0, 1)])


def _equal_batches(samples: np.ndarray, sizes: np.ndarray, batch_px: int) -> list[np.ndarray]:
    """The samples in batches, each of one size; sizes in ascending order, and in each the samples in theirs."""
    batches: list[np.ndarray] = []
    for size in np.unique(sizes, axis=0):
        found = samples[(sizes == size).all(axis=1)]
        length = max(1, batch_px // int(size.prod()))
        batches += [found[start : start + length] for start in range(0, len(found), length)]
    return batches
