"""Local files that are read at any place: some of them stay open, and a read that fails is repeated.

A file server that lost sight of a client for a moment fails every read that was under way once (EIO, as Lustre does
after an eviction). One on which another file has taken the name of an open one fails all reads of the old one (ESTALE
of NFS). So a file is opened again after an error, and a read is repeated where the error may pass.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from bitdance_scale.atomic_files import is_storage_fault

Key = TypeVar("Key", bound=Hashable)

PAUSES_S = (0.1, 0.5, 2.0)
"""Pauses before a read that failed is repeated; after the last repetition its error counts."""


class OpenFiles(Generic[Key]):
    """A bounded number of open files, of which the least recently used is closed first; for several threads.

    Args:
        path_of: gives the path of a file.
        max_open: files that stay open.
        reads_ahead: whether the system may read more than it is asked for; not where little is read in random order.
    """

    def __init__(self, path_of: Callable[[Key], str], max_open: int, *, reads_ahead: bool = True) -> None:
        self._path_of, self._max_open, self._reads_ahead = path_of, max_open, reads_ahead
        self._lock = threading.Lock()
        self._open: OrderedDict[Key, _OpenFile] = OrderedDict()

    def read(self, key: Key, offset: int, num_bytes: int) -> bytes:
        """Bytes `offset` .. `offset + num_bytes` of a file; fewer if it ends before that.

        Raises:
            OSError: it cannot be opened or read; what may pass (`is_storage_fault`) has then been tried four times.
        """
        for pause_s in PAUSES_S:
            try:
                return self._read_once(key, offset, num_bytes)
            except OSError as error:
                if not is_storage_fault(error):
                    raise
            time.sleep(pause_s)
        return self._read_once(key, offset, num_bytes)

    def close(self) -> None:
        """Closes the files, each as soon as the last read in it has ended."""
        with self._lock:
            self._open.clear()

    def _read_once(self, key: Key, offset: int, num_bytes: int) -> bytes:
        # This reference keeps the descriptor open until the read has ended, even if another thread evicts it.
        file = self._get(key)
        try:
            return os.pread(file.descriptor, num_bytes, offset)
        except OSError:
            self._forget(key, file)
            raise

    def _get(self, key: Key) -> _OpenFile:
        try:
            # No lock: each of the two is one step for other threads, which may evict the file in between.
            self._open.move_to_end(key)
            return self._open[key]
        except KeyError:
            return self._add(key)

    def _add(self, key: Key) -> _OpenFile:
        # Not under the lock: a slow file server must not hold up reads of other files.
        file = _OpenFile(self._path_of(key), self._reads_ahead)
        with self._lock:
            file = self._open.setdefault(key, file)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return file

    def _forget(self, key: Key, file: _OpenFile) -> None:
        """Leaves a file to the threads that read in it; one that another thread has opened since then stays."""
        with self._lock:
            if self._open.get(key) is file:
                del self._open[key]


class _OpenFile:
    """A descriptor that closes with its last reference, so that eviction never closes it while a thread reads."""

    def __init__(self, path: str, reads_ahead: bool) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        if not reads_ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
