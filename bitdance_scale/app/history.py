"""What each visitor of the page has drawn, and the folder from which the page serves pictures."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitdance_scale.app.settings import DrawSettings

MAX_ENTRIES = 50
"""Drawings that are kept for a visitor; the oldest goes, with its pictures."""
MAX_VISITORS = 100
"""Visitors that are kept; the one who was away longest goes."""


class PictureFolder:
    """A folder of its own below the system's temporary one, gone at the end; names cannot be guessed.

    A context manager.
    """

    def __enter__(self) -> PictureFolder:
        self.path = Path(tempfile.mkdtemp(prefix="bitdance-app-"))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def add(self, content: bytes, suffix: str = ".png") -> str:
        """Writes a file; returns its name.

        Raises:
            OSError: it cannot be written, as on a full disk; nothing of it is left.
        """
        name = secrets.token_urlsafe(16) + suffix
        try:
            (self.path / name).write_bytes(content)
        except OSError:
            self.remove([name])
            raise
        return name

    def remove(self, names: Sequence[str]) -> None:
        """Removes files, if they are there; one that cannot be removed stays until the end."""
        for name in names:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        file: its name in the folder.
        download_name: what it is called when it is saved.
        seed: of its own.
    """

    file: str
    download_name: str
    seed: int


@dataclass(frozen=True)
class Entry:
    """A drawing.

    Attributes:
        id: of the visitor's drawings.
        settings: what was drawn and how.
        pictures: of it.
        seconds: that it took.
    """

    id: int
    settings: DrawSettings
    pictures: Sequence[Picture]
    seconds: float


@dataclass
class Visitor:
    """A browser.

    Attributes:
        id: known to that browser alone.
        folder: of its pictures.
    """

    id: str
    folder: PictureFolder
    _entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    _num_added: int = 0

    @property
    def entries(self) -> list[Entry]:
        """Newest first."""
        return list(reversed(self._entries.values()))

    def add(self, settings: DrawSettings, pictures: Sequence[Picture], seconds: float) -> Entry:
        """Keeps a finished drawing."""
        self._num_added += 1
        entry = Entry(self._num_added, settings, pictures, seconds)
        self._entries[entry.id] = entry
        if len(self._entries) > MAX_ENTRIES:
            _, oldest = self._entries.popitem(last=False)
            self.folder.remove([picture.file for picture in oldest.pictures])
        return entry

    def find(self, entry_id: int) -> Entry | None:
        """A drawing that is still kept."""
        return self._entries.get(entry_id)

    def forget(self) -> None:
        """Removes all pictures."""
        for entry in self._entries.values():
            self.folder.remove([picture.file for picture in entry.pictures])
        self._entries.clear()


class Visitors:
    """Everybody who has the page open, or had.

    Args:
        folder: of their pictures.
    """

    def __init__(self, folder: PictureFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Visitor] = OrderedDict()

    def welcome(self, visitor_id: str | None) -> Visitor:
        """The visitor with this id; one that is not known gets an id of its own."""
        with self._lock:
            if visitor_id is not None and visitor_id in self._known:
                self._known.move_to_end(visitor_id)
                return self._known[visitor_id]
            visitor = Visitor(secrets.token_urlsafe(16), self._folder)
            self._known[visitor.id] = visitor
            if len(self._known) > MAX_VISITORS:
                _, gone = self._known.popitem(last=False)
                gone.forget()
            return visitor
