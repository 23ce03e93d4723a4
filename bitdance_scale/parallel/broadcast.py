"""One step's packs, from the rank that read them to all ranks of the replica.

The reader sends the layout of every pack to its replica. Images are shared out, encoded where they arrive, and come
back as bits: a 1024 px image is 16 KiB of bits but 17 TFLOP to encode, so that every rank encoding everything would
cost more than it saves. Packs that hold bits already pass through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.data.loader import LoadedStep
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.vision.tokenizer import VisionTokenizer

Images = list[np.ndarray]


@dataclass(frozen=True)
class _Header:
    """What every rank is told of a step: the step without its images, images per pack, and how they are dealt out."""

    step: LoadedStep
    num_images: list[int]
    order: list[int]


def share_step(read: LoadedStep | None, tokenizer: VisionTokenizer, topology: Topology) -> LoadedStep:
    """Gives every rank of the replica the packs of a step with their images encoded.

    Objects travel pickled, between ranks of one job only. A failure of the reader must be raised before this call on
    all ranks (`parallel/agreement.py`), or the others wait.

    Args:
        read: the step on the reader, None on the other ranks.
        tokenizer: encodes the images.
        topology: the ranks.
    """
    if len(topology.replica_ranks) == 1:
        assert read is not None, "a replica of one rank reads its own packs"
        header = _header(read)
        return _with_bits(header, _encode(tokenizer, [image for pack in read.packs for image in pack.images]))
    source, group, num_ranks = topology.replica_ranks[0], topology.replica_host_group, len(topology.replica_ranks)
    headers: list[_Header | None] = [None]
    shares: list[Images] | None = None
    if read is not None:
        images, own = [image for pack in read.packs for image in pack.images], _header(read)
        headers = [own]
        shares = [[images[index] for index in own.order[rank::num_ranks]] for rank in range(num_ranks)]
    dist.broadcast_object_list(headers, src=source, group=group)
    mine: list[Images] = [[]]
    dist.scatter_object_list(mine, shares, src=source, group=group)
    encoded: list[Images] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(encoded, _encode(tokenizer, mine[0]), group=group)
    header = cast(_Header, headers[0])
    bits: Images = [np.empty(0)] * len(header.order)
    for rank, share in enumerate(encoded):
        for index, image_bits in zip(header.order[rank::num_ranks], share, strict=True):
            bits[index] = image_bits
    return _with_bits(header, bits)


def _header(read: LoadedStep) -> _Header:
    images = [image for pack in read.packs for image in pack.images]
    # Dealt by size, the largest first, so that the shares cost about the same.
    order = sorted(range(len(images)), key=lambda index: -images[index].size)
    bare = [dataclasses.replace(pack, images=[]) for pack in read.packs]
    return _Header(dataclasses.replace(read, packs=bare), [len(pack.images) for pack in read.packs], order)


def _encode(tokenizer: VisionTokenizer, images: Sequence[np.ndarray]) -> Images:
    return tokenizer.encode([torch.tensor(image) for image in images])


def _with_bits(header: _Header, bits: Images) -> LoadedStep:
    """The step with the bits of its images, in pack order; a pack without images to encode stays as it is."""
    remaining = iter(bits)
    packs = []
    for loaded, count in zip(header.step.packs, header.num_images, strict=True):
        parts = [next(remaining) for _ in range(count)]
        filled = loaded.pack.with_bits(np.concatenate(parts)) if parts else loaded.pack
        packs.append(dataclasses.replace(loaded, pack=filled))
    return dataclasses.replace(header.step, packs=packs)
