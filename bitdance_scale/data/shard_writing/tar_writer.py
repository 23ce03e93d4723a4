"""Writes samples into a tar whose bytes depend on the samples alone: no times, no owners, plain USTAR headers."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bitdance_scale.atomic_files import replacing

BYTES_PER_SAMPLE = 4096
"""What a sample adds to its picture, roughly: three headers, padding, a caption and a record."""


class TarWriter:
    """A tar that appears under its name when its `with` block ends without an error; without a sample it does not.

    Args:
        path: of the tar; an earlier one is replaced.

    Attributes:
        num_samples: samples written.
        num_bytes: bytes of their members.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        self._tar: tarfile.TarFile | None = None
        self.num_samples = 0
        self.num_bytes = 0

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Writes the members of a sample, extension -> content, in their order."""
        if self._tar is None:
            writing = self._stack.enter_context(replacing(self._path))
            tar = tarfile.open(writing, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (the stack closes it)
            self._tar = self._stack.enter_context(tar)
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mtime, info.mode = len(content), 0, 0o644
            self._tar.addfile(info, io.BytesIO(content))
            self.num_bytes += len(content)
        self.num_samples += 1


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as ASCII JSON."""
    return json.dumps(record, indent=4, allow_nan=False).encode("ascii")


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, extension -> content) of the samples of a tar that `TarWriter` has written."""
    key = ""
    members: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            name, _, extension = info.name.partition(".")
            if members and name != key:
                yield key, members
                members = {}
            key = name
            file = tar.extractfile(info)
            assert file is not None
            members[extension] = file.read()
    if members:
        yield key, members
