"""A tokenizer measured on held-out images, which the ranks of a job share out.

What is computed of a batch does not depend on the number of ranks, counts are whole numbers, and means over images are
taken on one rank over the values of all. So every number is the same on any number of ranks, but for rFID, whose sums
are added up in float64 in another order.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.config.tokenizer_schema import GROUP_BITS
from bitdance_scale.data.held_out import HeldOutBatch, HeldOutImages, HeldOutSize
from bitdance_scale.data.index.index import Index
from bitdance_scale.errors import TrainingError
from bitdance_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from bitdance_scale.evaluation.inception import NUM_FEATURES, Inception, load_inception
from bitdance_scale.evaluation.pixels import psnr_db, ssim
from bitdance_scale.parallel.agreement import all_ranks, any_rank, from_all_ranks
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.process import StopRequest
from bitdance_scale.train.tokenizer_evaluation import BATCH_PX, DecodedBatch, decode_batch, to_pixels
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.bits import pack_bits
from bitdance_scale.vision.perceptual import Lpips, Network, load_lpips
from bitdance_scale.vision.weights import load_autoencoder

NUM_CODES = 1 << GROUP_BITS
_NUM_TIMED = 32


@dataclass(frozen=True)
class Measuring:
    """What is measured, with what, and where the results go.

    Attributes:
        weights: the tokenizer's weights file, or its folder.
        shards: of the images.
        sizes: at which images are looked at.
        num_images: images per size; None: all.
        lpips: weights of LPIPS by network.
        inception: weights of the features for rFID; None: left out.
        num_shown: images that the page shows, of the first and of the worst.
        out: folder of the results; None: they are printed only.
        picture: PNG of originals over reconstructions; None: none.
    """

    weights: Path
    shards: Sequence[str]
    sizes: Sequence[HeldOutSize]
    num_images: int | None = None
    lpips: Mapping[Network, Path] = field(default_factory=dict)
    inception: Path | None = None
    num_shown: int = 8
    out: Path | None = None
    picture: Path | None = None


class Shown(NamedTuple):
    """An image to show: its position in the index, and uint8 [H, W, 3] twice."""

    sample: int
    original: np.ndarray
    decoded: np.ndarray


@dataclass(frozen=True)
class SizeResult:
    """What was measured at one size, of all ranks.

    Attributes:
        size: the size.
        samples: int64 [n], positions of the images in the index, ascending.
        values: measure -> its value of each image, float64 [n]: `psnr_db`, `psnr_flipped_db`, `ssim`, `lpips_alex` and
            `lpips_vgg`, the last two if their weights were given.
        rfid: Frechet distance of the originals from their reconstructions; None: not measured.
        code_counts: int64 [G, 256], how often each code of a group of 8 bits occurs; bit 0 of a group is the highest.
        left_out: int64 [m], positions of the images that are too small.
        first: the first images.
        worst: those with the lowest PSNR, the lowest first.
        milliseconds: (encode, decode) of one image alone, of `first`.
    """

    size: HeldOutSize
    samples: np.ndarray
    values: Mapping[str, np.ndarray]
    rfid: float | None
    code_counts: np.ndarray
    left_out: np.ndarray
    first: Sequence[Shown]
    worst: Sequence[Shown]
    milliseconds: tuple[float, float]

    @property
    def means(self) -> dict[str, float]:
        """Measure -> mean over the images, and `rfid`."""
        means = {name: float(values.mean()) for name, values in self.values.items()}
        return means if self.rfid is None else means | {"rfid": self.rfid}

    @property
    def code_share(self) -> np.ndarray:
        """Share of the codes of each group that occur at all, float64 [G]."""
        return (self.code_counts > 0).mean(axis=1)

    @property
    def code_entropy_bits(self) -> np.ndarray:
        """Entropy of the codes of each group in bits, float64 [G]; at most 8."""
        share = self.code_counts / self.code_counts.sum(axis=1, keepdims=True)
        return -(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(axis=1)

    @property
    def bit_share(self) -> np.ndarray:
        """Share of +1 of every bit, float64 [C]."""
        is_set = np.unpackbits(np.arange(NUM_CODES, dtype=np.uint8)[:, None], axis=1)
        return ((self.code_counts @ is_set) / self.code_counts.sum(axis=1, keepdims=True)).reshape(-1)


class Measurer:
    """The networks that measure, on this rank.

    Args:
        measuring: what is measured.
        topology: the ranks.

    Raises:
        BitDanceError: weights are missing, or not those of the network they are named for.
    """

    def __init__(self, measuring: Measuring, topology: Topology) -> None:
        self.measuring, self.topology = measuring, topology
        self.autoencoder: Autoencoder = load_autoencoder(measuring.weights).to(topology.device)
        self.lpips: dict[Network, Lpips] = {
            network: load_lpips(network, path).to(topology.device) for network, path in measuring.lpips.items()
        }
        self.inception: Inception | None = None
        if measuring.inception is not None:
            self.inception = load_inception(measuring.inception).to(topology.device)

    def measure(self, index: Index, size: HeldOutSize, stop: StopRequest) -> SizeResult | None:
        """Measures the images of one size; a collective, with the result of all ranks on the first.

        Raises:
            BitDanceError: on all ranks: no image is large enough, one cannot be read, or the job was asked to stop.
        """
        topology = self.topology
        with all_ranks():
            images = HeldOutImages(index, size, self.measuring.num_images, BATCH_PX)
            part = _Part(self, images)
            for batch in images.batches(topology.rank, topology.world_size):
                if stop.is_requested:
                    break
                part.add(batch)
        if any_rank(stop.is_requested):
            raise TrainingError("stopped on request; nothing was written: start again to measure")
        return part.joined()


class _Part:
    """What this rank has measured at one size."""

    def __init__(self, measurer: Measurer, images: HeldOutImages) -> None:
        self._measurer, self._images = measurer, images
        self._device = measurer.topology.device
        num_shown = measurer.measuring.num_shown
        self._to_show = {*images.samples[:num_shown].tolist()}
        self._values: dict[int, dict[str, float]] = {}
        self._shown: dict[int, Shown] = {}
        num_groups = measurer.autoencoder.encoder.conv_out.out_channels // GROUP_BITS
        self._code_counts = torch.zeros(num_groups, NUM_CODES, dtype=torch.int64)
        self._statistics: tuple[FeatureStatistics, ...] = ()
        if measurer.inception is not None:
            self._statistics = tuple(FeatureStatistics(NUM_FEATURES, self._device) for _ in range(2))

    def add(self, batch: HeldOutBatch) -> None:
        """Measures a batch."""
        decoded = decode_batch(self._measurer.autoencoder, batch.images, batch.samples, self._device)
        values = self._measured(batch, decoded)
        for place, sample in enumerate(batch.samples):
            self._values[sample] = {name: float(column[place]) for name, column in values.items()}
            self._shown[sample] = Shown(sample, batch.images[place].copy(), decoded.decoded[place].copy())
        kept = self._to_show | {*self._worst(self._shown.keys(), self._values)}
        self._shown = {sample: shown for sample, shown in self._shown.items() if sample in kept}
        packed = pack_bits(decoded.tokens).long()
        for group in range(len(self._code_counts)):
            self._code_counts[group] += torch.bincount(packed[:, group], minlength=NUM_CODES)

    @torch.no_grad()
    def _measured(self, batch: HeldOutBatch, decoded: DecodedBatch) -> dict[str, np.ndarray]:
        values = {
            "psnr_db": psnr_db(decoded.decoded, batch.images),
            "psnr_flipped_db": psnr_db(decoded.decoded_flipped, batch.images),
            "ssim": ssim(decoded.decoded, batch.images),
        }
        originals, found = (to_pixels(pixels, self._device) for pixels in (batch.images, decoded.decoded))
        for network, lpips in self._measurer.lpips.items():
            values[f"lpips_{network}"] = lpips(originals, found).double().cpu().numpy()
        if self._measurer.inception is not None:
            for statistics, pixels in zip(self._statistics, (batch.images, decoded.decoded), strict=True):
                statistics.add(self._measurer.inception(pixels))
        return values

    def joined(self) -> SizeResult | None:
        """What all ranks have measured, on the first; a collective."""
        images, topology = self._images, self._measurer.topology
        values = {sample: row for rows in from_all_ranks(self._values) for sample, row in rows.items()}
        samples, worst = sorted(values), self._worst(values.keys(), values)
        counts = self._code_counts.to(self._device)
        dist.all_reduce(counts)
        for statistics in self._statistics:
            dist.all_reduce(statistics.sums)
        mine = [shown for sample, shown in self._shown.items() if sample in self._to_show or sample in worst]
        shown: list[list[Shown]] | None = [[]] * topology.world_size if topology.rank == 0 else None
        dist.gather_object(mine, shown)
        if shown is None:
            return None
        by_sample = {item.sample: item for part in shown for item in part}
        first = [by_sample[sample] for sample in sorted(self._to_show)]
        return SizeResult(
            size=images.size,
            samples=np.array(samples),
            values={name: np.array([values[sample][name] for sample in samples]) for name in values[samples[0]]},
            rfid=self._rfid(len(samples)),
            code_counts=counts.cpu().numpy(),
            left_out=images.left_out,
            first=first,
            worst=[by_sample[sample] for sample in worst],
            milliseconds=milliseconds_per_image(self._measurer.autoencoder, first, self._device),
        )

    def _worst(self, samples: Collection[int], values: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Those of the samples that are reconstructed worst, the worst first."""
        number = self._measurer.measuring.num_shown
        return heapq.nsmallest(number, samples, key=lambda sample: (values[sample]["psnr_db"], sample))

    def _rfid(self, num_images: int) -> float | None:
        if not self._statistics or num_images < 2:
            return None
        first, second = (statistics.moments() for statistics in self._statistics)
        return frechet_distance(first, second)


def milliseconds_per_image(
    autoencoder: Autoencoder, images: Sequence[Shown], device: torch.device
) -> tuple[float, float]:
    """(encode, decode) of one image at a time, the median over at most 32 images."""

    def now_s() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    encode_s, decode_s = [], []
    with torch.inference_mode():
        for image in images[:_NUM_TIMED]:
            pixels = to_pixels(image.original[None], device)
            start = now_s()
            bits = autoencoder.encode(pixels)
            middle = now_s()
            autoencoder.decode(bits)
            encode_s.append(middle - start)
            decode_s.append(now_s() - middle)
    return 1000 * float(np.median(encode_s)), 1000 * float(np.median(decode_s))
