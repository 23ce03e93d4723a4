"""What files and S3 objects have in common: how a path names them, how a change shows, how a read fails.

A module of its own because `stores.py` and `s3.py` both need it and `stores.py` imports `s3.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardState:
    """Shows whether a shard has changed.

    Attributes:
        num_bytes: length of the shard.
        tag: modification time in nanoseconds of a file, ETag of an object.
    """

    num_bytes: int
    tag: str


class ReadError(Exception):
    """A range could not be read and another try would not help; the message says why.

    Attributes:
        is_changed: whether the reason is that the shard was replaced by another one.
    """

    def __init__(self, message: str, is_changed: bool = False) -> None:
        super().__init__(message)
        self.is_changed = is_changed


class WriteError(Exception):
    """An object could not be written or deleted, and another try would not help now; the message says why."""
