"""What a source of pictures offers, whatever it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bitdance_scale.data.shard_writing.captions import NO_CAPTION, Caption


class SkippedPicture(Exception):
    """A picture that is left out.

    Attributes:
        cause: one word by which it is counted, such as `bad_image`.
        detail: what exactly was found.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = str(cause)
        self.detail = detail


@dataclass(frozen=True)
class SourcePicture:
    """A picture as the source has it.

    Attributes:
        name: where it comes from, such as its path in the folder; not empty.
        content: the bytes of the file; or why there are none.
        caption: its caption.
        columns: what else the source says of it; values that JSON can hold.
        label: the number of its class; None: it has none.
    """

    name: str
    content: bytes | SkippedPicture
    caption: Caption = NO_CAPTION
    columns: dict[str, Any] = field(default_factory=dict)
    label: int | None = None


class PictureSource(Protocol):
    """Pictures in a fixed order.

    Attributes:
        kind: what it is, in words.
        digest: of names, sizes and tables; another source has another one.
        num_bytes: int64 [n], the size of every picture; from a Parquet file, the mean of its row group.
        left_out: what in the source is no picture -> how often.
    """

    kind: str
    digest: str
    num_bytes: np.ndarray
    left_out: dict[str, int]

    def can_start_at(self, position: int) -> bool:
        """Whether pictures can be read from `position` on without reading many others."""
        ...

    def pictures(self, start: int, stop: int) -> Iterator[SourcePicture]:
        """The pictures from `start` to `stop`, read one after the other.

        Raises:
            OSError: of the file system, where it may pass.
        """
        ...

    def without_caption(self) -> Iterator[str]:
        """Names of the pictures that are known to have no caption before any is read."""
        ...


def digest_of(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of parts that cannot run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def kind_of_file(extension: str) -> str:
    """What a file that is left out is counted as: `.gif`, or `no extension`; `extension` has no dot."""
    return f".{extension}" if extension else "no extension"
