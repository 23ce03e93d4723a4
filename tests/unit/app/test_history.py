"""What is kept of a visitor, for how long, and that the pictures go with it."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from bitdance_scale.app import history
from bitdance_scale.app.history import Picture, PictureFolder, Visitors
from bitdance_scale.app.settings import DrawSettings

SETTINGS = DrawSettings("a", 32, 32, 4, 2.0, 3, 1)


def files(folder: PictureFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


def add(visitor, folder):
    return visitor.add(SETTINGS, [Picture(folder.add(b"png"), "a.png", 3)], 1.0)


def test_the_folder_is_of_this_user_and_goes_at_the_end():
    with PictureFolder() as folder:
        path = folder.path
        names = {folder.add(b"one"), folder.add(b"two")}
        assert files(folder) == names and stat.S_IMODE(path.stat().st_mode) == 0o700
        assert all(len(name) > 20 for name in names)
    assert not path.exists()


def test_a_file_that_cannot_be_removed_is_left_to_the_end(folder, monkeypatch):
    name = folder.add(b"one")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        folder.remove([name, "gone"])
    assert files(folder) == {name}
    folder.remove([name, "gone"])
    assert files(folder) == set()


def test_the_newest_drawings_are_kept(folder, monkeypatch):
    monkeypatch.setattr(history, "MAX_ENTRIES", 3)
    visitor = Visitors(folder).welcome(None)
    entries = [add(visitor, folder) for _ in range(5)]
    assert [entry.id for entry in visitor.entries] == [5, 4, 3]
    assert visitor.find(1) is None and visitor.find(4) == entries[3]
    assert files(folder) == {entry.pictures[0].file for entry in entries[2:]}


def test_visitors_know_their_own_drawings_alone(folder):
    visitors = Visitors(folder)
    one, other = visitors.welcome(None), visitors.welcome("no such id")
    assert one.id != other.id and "no such id" not in (one.id, other.id)
    add(one, folder)
    assert visitors.welcome(one.id) is one and len(one.entries) == 1 and other.entries == []


def test_the_visitor_who_was_away_longest_goes(folder, monkeypatch):
    monkeypatch.setattr(history, "MAX_VISITORS", 2)
    visitors = Visitors(folder)
    one, two = visitors.welcome(None), visitors.welcome(None)
    add(one, folder)
    add(two, folder)
    visitors.welcome(one.id)
    visitors.welcome(None)
    assert visitors.welcome(one.id) is one
    assert two.entries == [] and files(folder) == {one.entries[0].pictures[0].file}
    assert visitors.welcome(two.id) is not two
