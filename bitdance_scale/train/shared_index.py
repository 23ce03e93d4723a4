"""The index of a data set for all ranks of a job: the first rank brings it up to date, then every rank opens it.

Shards that a job holds out are compared with those that it trains on before either is read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.config.data_schema import DataSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.bit_shards import check_bits
from bitdance_scale.data.captions import DEFAULT_SOURCE
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index, default_index_dir, open_index, sources_index_dir
from bitdance_scale.data.index.report import check_skipped
from bitdance_scale.data.labels import check_labels
from bitdance_scale.data.plan.selection import store_selection
from bitdance_scale.data.storage.shards import as_spelled, expand_shards, expand_sources, real_path
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.data.storage.streams import expand_stream_sources
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.parallel.agreement import all_ranks, on_first_rank


@dataclass(frozen=True)
class _Built:
    """What the first rank has built.

    Attributes:
        table: file of the table.
        hash: of the index.
        shards_per_source: shards of each source.
    """

    table: Path
    hash: str
    shards_per_source: list[int]


def run_index(config: RunConfig) -> Index | None:
    """`labelled_index` of a run; None with `data.mode = "stream"`.

    Raises:
        ConfigError: on every rank, a shard of `evaluate.shards` is trained on.
        DataError: on every rank, as `labelled_index`.
    """
    if config.data.mode == "stream":
        on_first_rank(lambda: _check_streams(config))
        return None
    return labelled_index(config, config.evaluate.shards)


def labelled_index(config: RunConfig, held_out: Sequence[str] = ()) -> Index:
    """`training_index` of a run, in which every image has the class and the stored bits that the run needs.

    Raises:
        ConfigError, DataError: on every rank, as `training_index`, or which labels or bits are missing or wrong.
    """
    index = training_index(config.data, held_out)
    if not config.model.parts.has_text:
        on_first_rank(lambda: check_labels(index, config))
    if config.data.bits_dir:
        on_first_rank(lambda: check_bits(index, config))
    return index


def training_index(data: DataSection, held_out: Sequence[str] = ()) -> Index:
    """The index of everything that a run trains on, divided into its sources.

    Args:
        data: shards or sources, captions, index folder.
        held_out: shards that must not be among them, as `evaluate.shards`.

    Raises:
        ConfigError: on every rank, one of them is.
        DataError: on every rank, what is wrong with the shards; that they lost too many samples, too.
    """
    built = on_first_rank(lambda: _build_sources(data, held_out))
    return _open(built, data.max_skipped_share).divided(built.shards_per_source)


def image_index(specs: Sequence[str], index_dir: str, max_skipped_share: float, held_out: Sequence[str] = ()) -> Index:
    """The index of shards of which only the images are needed; otherwise as `training_index`.

    Args:
        specs: as `data.shards`.
        index_dir: as `data.index_dir`; empty: beside the first shard.
        max_skipped_share: share of samples that the shards may have lost.
        held_out: as of `training_index`.
    """
    return _open(on_first_rank(lambda: _build_images(specs, index_dir, held_out)), max_skipped_share)


def held_out_index_dir(index_dir: str) -> str:
    """Where the index of held-out shards lies, as `index_dir` of a section.

    Beside the shards, or where the run's own index is: the shards may be in a place that is read only.

    Args:
        index_dir: `data.index_dir` of the run.
    """
    return str(Path(index_dir) / "held_out") if index_dir else ""


def _build_sources(data: DataSection, held_out: Sequence[str]) -> _Built:
    # Tar headers are read once: nothing for a cache.
    stores, sources = Stores(dataclasses.replace(data.s3, cache_dir="")), data.active_sources
    if len(sources) == 1:
        by_source = [expand_shards(sources[0].shards, stores=stores)]
        index_dir = data.index_dir or default_index_dir(by_source[0])
    else:
        by_source = expand_sources(sources, stores)
        index_dir = data.index_dir or sources_index_dir([source.name for source in sources], by_source[0])
    shards = [path for paths in by_source for path in paths]
    _check_held_out(held_out, shards, stores)
    captions = [choice.source for choice in data.captions]
    index = build_index(shards, index_dir, captions=captions, stores=stores)
    num_shards = [len(paths) for paths in by_source]
    store_selection(index.divided(num_shards), data)
    return _built(index, num_shards)


def _build_images(specs: Sequence[str], index_dir: str, held_out: Sequence[str]) -> _Built:
    shards, stores = expand_shards(specs), Stores()
    _check_held_out(held_out, shards, stores)
    index_dir = index_dir or default_index_dir(shards)
    index = build_index(shards, index_dir, captions=[DEFAULT_SOURCE], stores=stores)
    return _built(index, [len(shards)])


def _built(index: Index, shards_per_source: list[int]) -> _Built:
    assert index.table is not None, "a built index is in a folder"
    return _Built(index.table, index.hash, shards_per_source)


def _check_streams(config: RunConfig) -> None:
    if config.evaluate.shards:
        streams = itertools.chain(*expand_stream_sources(config.data.active_sources))
        _check_held_out(config.evaluate.shards, streams, Stores(dataclasses.replace(config.data.s3, cache_dir="")))


def _check_held_out(held_out: Sequence[str], trained: Iterable[str], stores: Stores) -> None:
    """Refuses held-out shards that are trained on, whatever paths lead to them.

    Args:
        held_out: `evaluate.shards`.
        trained: what is trained on, expanded.
        stores: how to reach S3.
    """
    if not held_out:
        return
    real = {real_path(path): path for path in trained}
    for path in expand_shards(held_out, "evaluate.shards", stores):
        if (same := real.get(real_path(path))) is not None:
            raise ConfigError(
                f"evaluate.shards: {path} is trained on as well{as_spelled(same, path)}, and what a model does with "
                "images that it was trained on says nothing of others. Hold other shards out, or take this one out of "
                "data.shards or data.sources."
            )


def _open(built: _Built, max_skipped_share: float) -> Index:
    with all_ranks():
        index = open_index(built.table, is_verified=True)
        if index.hash != built.hash:
            raise DataError(
                f"{built.table}: another job indexes the same shards, which have changed, and has replaced this run's "
                "index while it started. Start again."
            )
        check_skipped(index, max_skipped_share)
    return index
