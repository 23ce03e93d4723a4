"""One step's packs, from the rank that read them to all ranks of the replica.

The reader sends the layout of every pack to its replica. Images are shared out, encoded where they arrive, and come
back as bits: a 1024 px image is 16 KiB of bits but 17 TFLOP to encode, so that every rank encoding everything would
cost more than it saves. Packs that hold bits already pass through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.vision.tokenizer import VisionTokenizer


@dataclass(frozen=True)
class ReadStep:
    """What the reader of a replica has for one step.

    Attributes:
        packs: the micro-batches of this replica.
        images: per pack, per sample, uint8 [H, W, 3]; empty lists for packs whose bits are known.
        report: figures of the step for the metrics; any small picklable object of ours.
    """

    packs: Sequence[Pack]
    images: Sequence[Sequence[np.ndarray]]
    report: object


@dataclass(frozen=True)
class SharedStep:
    """The same on every rank of the replica, all images encoded."""

    packs: Sequence[Pack]
    report: object


def share_step(read: ReadStep | None, tokenizer: VisionTokenizer, topology: Topology) -> SharedStep:
    """Gives every rank of the replica the packs of a step; `read` is None except on the reader.

    Objects travel pickled, between ranks of one job only. A failure of the reader must be raised before this call on
    all ranks (`parallel/agreement.py`), or the others wait.
    """
    if len(topology.replica_ranks) == 1:
        assert read is not None
        bits = _encode(tokenizer, [image for images in read.images for image in images])
        return SharedStep(_with_bits(read.packs, [len(images) for images in read.images], bits), read.report)
    source, group, num_ranks = topology.replica_ranks[0], topology.replica_host_group, len(topology.replica_ranks)
    header: list[object] = [None]
    shares: list[list[np.ndarray]] | None = None
    if read is not None:
        images = [image for pack_images in read.images for image in pack_images]
        # Dealt by size, the largest first, so that the shares cost about the same.
        order = sorted(range(len(images)), key=lambda index: -images[index].size)
        shares = [[images[index] for index in order[rank::num_ranks]] for rank in range(num_ranks)]
        header = [(read.packs, [len(pack_images) for pack_images in read.images], order, read.report)]
    dist.broadcast_object_list(header, src=source, group=group)
    mine: list[list[np.ndarray] | None] = [None]
    dist.scatter_object_list(mine, shares, src=source, group=group)
    encoded: list[list[np.ndarray] | None] = [None] * num_ranks
    dist.all_gather_object(encoded, _encode(tokenizer, mine[0]), group=group)
    packs, num_images, order, report = header[0]
    bits: list[np.ndarray | None] = [None] * len(order)
    for rank, share in enumerate(encoded):
        for index, image_bits in zip(order[rank::num_ranks], share, strict=True):
            bits[index] = image_bits
    return SharedStep(_with_bits(packs, num_images, bits), report)


def _encode(tokenizer: VisionTokenizer, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    return tokenizer.encode([torch.tensor(image) for image in images])


def _with_bits(packs: Sequence[Pack], num_images: Sequence[int], bits: Sequence[np.ndarray]) -> list[Pack]:
    """Gives every pack the bits of its images, in pack order; a pack without images to encode stays as it is."""
    remaining = iter(bits)
    filled = []
    for pack, count in zip(packs, num_images, strict=True):
        parts = [next(remaining) for _ in range(count)]
        filled.append(pack.with_bits(np.concatenate(parts)) if parts else pack)
    return filled
