"""Compares shards with their index: which bytes have changed since they were indexed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bitdance_scale.data.index.build import read_shard
from bitdance_scale.data.index.index import Index, ShardEntry
from bitdance_scale.data.index.shard_scan import caption_column, changed_images, shard_digests
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES
from bitdance_scale.data.index.workers import default_workers, in_processes
from bitdance_scale.data.storage.store_contract import ReadError, ShardState
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError


@dataclass(frozen=True)
class ShardChange:
    """What is no longer as it was indexed in a shard.

    Attributes:
        entry: the shard.
        problems: what has changed, in words; empty: nothing.
    """

    entry: ShardEntry
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    entry: ShardEntry
    places: np.ndarray
    digests: Mapping[str, str]


def changed_shards(index: Index, stores: Stores, num_workers: int | None = None) -> Iterator[ShardChange]:
    """Reads all shards again, in any order, and says of each what has changed.

    Args:
        index: the index.
        stores: how to read shards.
        num_workers: processes that read; None: depends on the amount.
    """
    if num_workers is None:
        num_workers = default_workers(sum(entry.num_bytes for entry in index.shards))
    compare = partial(_compare, captions=index.captions, stores=stores)
    yield from in_processes(compare, _tasks(index), min(num_workers, len(index.shards)))


def _tasks(index: Index) -> Iterator[_Task]:
    """A task per shard, each made when it is due, because all together would hold the whole index."""
    digests = itertools.chain.from_iterable(segment.metadata["shards"] for segment in index.segments)
    for row, (entry, own) in enumerate(zip(index.shards, digests, strict=True)):
        samples = index.shard_samples(row)
        yield _Task(entry, index.places(slice(samples.start, samples.stop)), own)


def _compare(task: _Task, captions: Sequence[str], stores: Stores) -> ShardChange:
    return ShardChange(task.entry, tuple(_problems(task, captions, stores)))


def _problems(task: _Task, captions: Sequence[str], stores: Stores) -> Iterator[str]:
    entry = task.entry
    try:
        (state,) = stores.states([entry.path])
        content = read_shard(entry.path, ShardState(state.num_bytes, entry.tag), captions, stores)
    except (ReadError, DataError) as error:
        yield f"cannot be read ({error})"
        return
    if state.num_bytes != entry.num_bytes:
        yield f"{state.num_bytes} bytes, it was indexed with {entry.num_bytes}"
    places = content.segment.columns["place"]
    for begin, end in changed_images(task.places, places):
        yield f"bytes {begin}..{end}: not the image that was indexed"
    added = np.setdiff1d(places[:, 0], task.places[:, 0])
    if len(added):
        yield f"{len(added)} images that were not indexed, the first at byte {int(added[0]) * BLOCK_BYTES}"
    digests = shard_digests(content.segment.columns)
    for source in captions:
        if digests[caption_column(source)] != task.digests[caption_column(source)]:
            yield f"captions {source}: not those that were indexed"
