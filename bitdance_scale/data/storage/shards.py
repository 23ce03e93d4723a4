"""Expands `data.shards` and `data.sources` to lists of tars, by webdataset's rules for brace lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from webdataset.shardlists import expand_urls

from bitdance_scale.config.data_schema import DataSource
from bitdance_scale.config.schema import S3_SCHEME
from bitdance_scale.credentials import WAY_OUT, find_credentials
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import DataError, printable

_GLOB_CHARACTERS = frozenset("*?[")


def expand_braces(spec: str, setting: str = "data.shards") -> list[str]:
    """Shard names of a webdataset brace list such as `data/{00000..00099}.tar`.

    Args:
        spec: the brace list.
        setting: name of the setting for messages.

    Raises:
        DataError: unbalanced braces or an unset `${variable}`; or credentials in the list, or in such a variable.
    """
    _refuse_credentials(spec, setting)
    try:
        names: list[str] = expand_urls(spec)
    # webdataset asserts that the variables are set.
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{setting}: {spec!r} is no valid brace list ({error}). Write it as 'data/{{00000..00099}}.tar'."
        ) from error
    for name in names:
        _refuse_credentials(name, setting)
    return names


def expand_sources(sources: Sequence[DataSource], stores: Stores | None = None) -> list[list[str]]:
    """Paths of the tars of every source, as `expand_shards` gives them.

    Raises:
        DataError: a spec matches nothing, a shard does not exist, or a shard is in two sources, by whatever paths.
    """
    expanded = [expand_shards(source.shards, f"shards of source {source.name!r}", stores) for source in sources]
    owners: dict[str, tuple[str, str]] = {}
    for source, paths in zip(sources, expanded, strict=True):
        real = {real_path(path): path for path in paths}
        for same, path in real.items():
            if same in owners:
                name, other = owners[same]
                raise DataError(
                    f"data.sources: shard {path} is in source {name!r}{as_spelled(other, path)} and in source "
                    f"{source.name!r}, so its images would count for both shares. Leave it in one of the two."
                )
        owners |= {same: (source.name, path) for same, path in real.items()}
    return expanded


def real_path(path: str) -> str:
    """What a path of a shard leads to, so that two spellings of one shard are equal."""
    return path if path.startswith(S3_SCHEME) else os.path.realpath(path)


def as_spelled(other: str, path: str) -> str:
    """For messages about a shard that is named twice: the other spelling, if it is another one."""
    return "" if other == path else f" (as {other})"


def expand_shards(specs: Iterable[str], setting: str = "data.shards", stores: Stores | None = None) -> list[str]:
    """Paths of the tars that a list of files, folders, globs and brace lists names, local or on S3.

    Args:
        specs: each a tar, a folder (every `*.tar` in it, sorted), a glob (sorted) or a brace list (in its order). A
            tar that is named twice is taken once.
        setting: name of the setting for messages.
        stores: how to reach S3; None: with default settings. Objects that are named in full are not checked here.

    Returns:
        Absolute paths, or `s3://BUCKET/KEY`, in the order of the specs.

    Raises:
        DataError: a spec matches nothing, a shard does not exist, or its path is not UTF-8.
    """
    paths: list[str] = []
    for spec in specs:
        if spec.startswith(S3_SCHEME):
            paths += [
                path for candidate in expand_braces(spec, setting) for path in _objects(candidate, setting, stores)
            ]
        else:
            paths += [os.path.abspath(path) for path in _expand_spec(spec, setting)]
    if not paths:
        raise DataError(f"{setting} is empty: name at least one tar, folder, glob or brace list.")
    for path in paths:
        if printable(path) != path:
            raise DataError(
                f"{setting}: {path} is not UTF-8, in which the index stores paths. Rename the file or folder, or name "
                "a symbolic link to it (ln -s)."
            )
    return list(dict.fromkeys(paths))


def _refuse_credentials(path: str, setting: str) -> None:
    found = find_credentials(path)
    if found is not None:
        raise DataError(f"{setting} holds {found}: paths of shards are stored in the index and shown; {WAY_OUT}.")


def _expand_spec(spec: str, setting: str) -> list[str]:
    _refuse_credentials(spec, setting)
    if "://" in spec or spec.startswith("pipe:"):
        raise DataError(f"{setting}: {spec!r}: only local files and s3:// can be read. Mount or copy the shards.")
    candidates = [spec] if os.path.exists(spec) else expand_braces(spec, setting)
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


def _objects(candidate: str, setting: str, stores: Stores | None) -> list[str]:
    """Objects that one path on S3 names: an object, all tars of a folder, or all matches of a glob."""
    if candidate.endswith(".tar") and not _GLOB_CHARACTERS & set(candidate):
        return [candidate]
    pattern = candidate if candidate.endswith(".tar") else candidate.rstrip("/") + "/*.tar"
    start = min(pattern.find(character) for character in _GLOB_CHARACTERS if character in pattern)
    listed = (stores or Stores()).list(pattern[:start], is_flat="/" not in pattern[start:])
    # As in a glob of files, a star does not match a slash.
    found = [path for path in listed if path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)]
    if not found:
        raise DataError(f"{setting}: {candidate!r} holds no *.tar. Correct {setting}.")
    return found
