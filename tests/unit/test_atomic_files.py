"""A file or folder is the old one or the new one, whatever fails in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance_scale import atomic_files
from bitdance_scale.atomic_files import commit_folder, new_folder, replacing, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_file_is_replaced_whole(tmp_path: Path, is_shared: bool) -> None:
    path = tmp_path / "figures" / "page.png"
    write_bytes(path, b"old", is_shared=is_shared)
    with pytest.raises(OSError, match="disk full"), replacing(path, is_shared=is_shared) as writing:
        writing.write_bytes(b"n")
        raise OSError("disk full")
    assert path.read_bytes() == b"old" and names(path.parent) == ["page.png"]
    write_bytes(path, b"new", is_shared=is_shared)
    assert path.read_bytes() == b"new" and names(path.parent) == ["page.png"]


def test_a_rename_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(source: object, target: object) -> None:
        raise OSError("rename refused")

    monkeypatch.setattr(atomic_files.os, "replace", fail)
    with pytest.raises(OSError, match="rename refused"):
        write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_text_is_utf8_in_every_locale(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from bitdance_scale.atomic_files import write_text; "
    code += r"write_text(Path(sys.argv[1]), '\u7ea2\u8272\r\n')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=True, env=environment, timeout=60)
    assert (tmp_path / "file").read_bytes() == "红色\r\n".encode()


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, is_shared=True) as first, replacing(path, is_shared=True) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first", "the outer block ended last"


def test_a_folder_appears_whole_and_its_predecessor_stays_until_then(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as writing:
        (writing / "a").write_text("old")
        assert not out.exists()
    with pytest.raises(ValueError, match="broken"), new_folder(out) as writing:
        (writing / "a").write_text("new")
        raise ValueError("broken")
    assert (out / "a").read_text() == "old" and names(tmp_path) == ["out"]
    with new_folder(out) as writing:
        (writing / "b").write_text("new")
    assert names(out) == ["b"] and names(tmp_path) == ["out"]


def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", os.rename

    def rename_too_late(source: Path, target: Path) -> None:
        out.mkdir()
        (out / "a").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(atomic_files.os, "rename", rename_too_late)
    with pytest.raises(OSError, match="not empty"), new_folder(out) as writing:
        (writing / "a").write_text("ours")
    assert (out / "a").read_text() == "theirs" and names(tmp_path) == ["out"]


def test_an_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "a").write_text("old")
    (tmp_path / "out.writing").mkdir()
    with pytest.raises(ValueError, match="broken"), new_folder(out):
        raise ValueError("broken")
    assert (out / "a").read_text() == "old" and names(tmp_path) == ["out"]


def test_of_two_equal_folders_the_first_stays(tmp_path: Path) -> None:
    out = tmp_path / "columns"
    for number in range(2):
        writing = tmp_path / f"writing_{number}"
        writing.mkdir()
        (writing / "number").write_text(str(number))
        commit_folder(writing, out)
    assert (out / "number").read_text() == "0" and names(tmp_path) == ["columns"]
