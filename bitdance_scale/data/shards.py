"""From `data.shards` to the list of tars."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable

from bitdance_scale.data.reader import expand_braces
from bitdance_scale.errors import DataError

_GLOB_CHARACTERS = frozenset("*?[")


def expand_shards(specs: Iterable[str]) -> list[str]:
    """Paths of the tars that files, folders, globs and brace lists stand for.

    Args:
        specs: each a tar, a folder (every `*.tar` in it, sorted), a glob (sorted) or a brace list (in its order). A
            tar named twice is taken once.

    Returns:
        Absolute paths, in the order of the specs.

    Raises:
        DataError: a spec matches nothing, or a shard does not exist.
    """
    paths = [os.path.abspath(path) for spec in specs for path in _expand_spec(spec)]
    if not paths:
        raise DataError("data.shards is empty: name at least one tar, folder, glob or brace list.")
    return list(dict.fromkeys(paths))


def _expand_spec(spec: str) -> list[str]:
    if "://" in spec:
        raise DataError(f"data.shards: {spec!r}: only local files can be read; mount or copy the shards.")
    if os.path.exists(spec):
        candidates = [spec]
    else:
        candidates = expand_braces(spec)
    paths: list[str] = []
    for candidate in candidates:
        if os.path.isdir(candidate):
            found = sorted(glob.glob(os.path.join(glob.escape(candidate), "*.tar")))
            if not found:
                raise DataError(f"data.shards: folder {candidate!r} holds no *.tar. Correct data.shards.")
        elif os.path.isfile(candidate):
            found = [candidate]
        elif _GLOB_CHARACTERS & set(candidate):
            found = sorted(glob.glob(candidate))
            if not found:
                raise DataError(f"data.shards: {candidate!r} matches no file. Correct data.shards.")
        else:
            raise DataError(
                f"data.shards: shard {candidate!r} (from {spec!r}) does not exist. Restore the file or correct "
                "data.shards."
            )
        paths += found
    return paths
