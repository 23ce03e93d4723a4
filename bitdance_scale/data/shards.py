"""From `data.shards` and `data.sources` to lists of tars."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence

from bitdance_scale.config.schema import DataSource
from bitdance_scale.data.reader import expand_braces
from bitdance_scale.errors import DataError

_GLOB_CHARACTERS = frozenset("*?[")


def expand_sources(sources: Sequence[DataSource]) -> list[list[str]]:
    """Paths of the tars of every source, each as `expand_shards` gives them.

    Raises:
        DataError: a spec matches nothing, a shard does not exist, or one is in two sources.
    """
    expanded = [expand_shards(source.shards, f"shards of source {source.name!r}") for source in sources]
    owners: dict[str, str] = {}
    for source, paths in zip(sources, expanded, strict=True):
        for path in paths:
            if path in owners:
                raise DataError(
                    f"data.sources: shard {path} is in source {owners[path]!r} and in source {source.name!r}. Leave it in "
                    "one of the two: its images would count for both shares."
                )
        owners |= dict.fromkeys(paths, source.name)
    return expanded


def expand_shards(specs: Iterable[str], setting: str = "data.shards") -> list[str]:
    """Paths of the tars that files, folders, globs and brace lists stand for.

    Args:
        specs: each a tar, a folder (every `*.tar` in it, sorted), a glob (sorted) or a brace list (in its order). A
            tar named twice is taken once.
        setting: what messages call them.

    Returns:
        Absolute paths, in the order of the specs.

    Raises:
        DataError: a spec matches nothing, or a shard does not exist.
    """
    paths = [os.path.abspath(path) for spec in specs for path in _expand_spec(spec, setting)]
    if not paths:
        raise DataError(f"{setting} is empty: name at least one tar, folder, glob or brace list.")
    return list(dict.fromkeys(paths))


def _expand_spec(spec: str, setting: str) -> list[str]:
    if "://" in spec:
        raise DataError(f"{setting}: {spec!r}: only local files can be read; mount or copy the shards.")
    if os.path.exists(spec):
        candidates = [spec]
    else:
        candidates = expand_braces(spec, setting)
    paths: list[str] = []
    for candidate in candidates:
        if os.path.isdir(candidate):
            found = sorted(glob.glob(os.path.join(glob.escape(candidate), "*.tar")))
            if not found:
                raise DataError(f"{setting}: folder {candidate!r} holds no *.tar. Correct {setting}.")
        elif os.path.isfile(candidate):
            found = [candidate]
        elif _GLOB_CHARACTERS & set(candidate):
            found = sorted(glob.glob(candidate))
            if not found:
                raise DataError(f"{setting}: {candidate!r} matches no file. Correct {setting}.")
        else:
            raise DataError(
                f"{setting}: shard {candidate!r} (from {spec!r}) does not exist. Restore the file or correct {setting}."
            )
        paths += found
    return paths
