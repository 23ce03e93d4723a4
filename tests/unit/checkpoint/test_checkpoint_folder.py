from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest

from bitdance_scale.checkpoint import checkpoint_folder
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.errors import CheckpointError


def save(folder: CheckpointFolder, step: int) -> None:
    with folder.write(step) as path:
        (path / "tensors").mkdir()
        folder._before("body")
        (path / "tensors" / "a.bin").write_bytes(bytes([step]) * 100)
        (path / "note.txt").write_text(f"step {step}")


def content(path: Path) -> str:
    assert (path / "tensors" / "a.bin").stat().st_size == 100
    return (path / "note.txt").read_text()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.latest() is None and folder.steps() == []


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        save(folder, step)
        assert content(folder.latest()) == f"step {step}"
    assert names(folder.root) == ["latest", "step_00000002", "step_00000003"]
    assert (folder.root / "latest").read_text() == "step_00000003\n"


def kill_at(root: Path, step: int, kill_call: int) -> str | None:
    """Saves in a child that kills itself at one step of the protocol; the step's name, None if it was never reached."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def before(action: str) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_call:
                os.write(writer, action.encode())
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            save(CheckpointFolder(root, keep=1, before=before), step)
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        action = pipe.read()
    assert bool(action) == os.WIFSIGNALED(status)
    return action or None


@pytest.mark.parametrize("is_first", [True, False], ids=["first save", "second save"])
def test_a_kill_at_any_step_leaves_a_whole_checkpoint(tmp_path, is_first):
    actions = []
    while True:
        root = tmp_path / str(len(actions))
        if not is_first:
            save(CheckpointFolder(root, keep=1), 1)
        action = kill_at(root, 2, kill_call=len(actions) + 1)
        folder = CheckpointFolder(root, keep=1)
        found = folder.latest()
        is_committed = action in (None, "delete_rename", "delete") or (action == "latest" and is_first)
        if is_committed:
            assert content(found) == "step 2"
        else:
            assert (found is None) if is_first else content(found) == "step 1"
        save(folder, 3)
        assert content(folder.latest()) == "step 3"
        assert names(root) == ["latest", "step_00000003"]
        if action is None:
            break
        actions.append(action)
    expected = ["clean", "create", "body", "manifest", "rename", "latest"]
    assert actions == expected + ([] if is_first else ["delete_rename", "delete"])


def test_an_error_in_the_block_leaves_the_earlier_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    message = "step 2 was not committed: OSError: disk full. Earlier checkpoints are as they were"
    with pytest.raises(CheckpointError, match=message), folder.write(2):
        raise OSError("disk full")
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert content(folder.latest()) == "step 1"


def test_the_checkpoint_in_use_is_not_overwritten(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    with pytest.raises(CheckpointError, match="step_00000001 exists"):
        save(folder, 1)
    assert content(folder.latest()) == "step 1"


@pytest.mark.parametrize("file", ["tensors/a.bin", "manifest.json"])
def test_a_missing_file_is_named_with_the_way_back(tmp_path, file):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    save(folder, 2)
    (tmp_path / "step_00000002" / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing; step_00000001 is whole: .* write step_00000001"):
        folder.latest()


def test_a_short_file_is_named(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    os.truncate(tmp_path / "step_00000001" / "tensors" / "a.bin", 99)
    with pytest.raises(CheckpointError, match="a.bin has 99 bytes, 100 were written; no other checkpoint is whole"):
        folder.latest()


@pytest.mark.parametrize("text", ["step_00000007\n", ""])
def test_a_pointer_to_nothing_is_refused(tmp_path, text):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CheckpointError, match="write step_00000001 into"):
        folder.latest()


def test_without_a_pointer_the_newest_is_used_and_said(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    save(folder, 2)
    (tmp_path / "latest").unlink()
    with caplog.at_level(logging.WARNING):
        assert content(folder.latest()) == "step 2"
    assert "taking the newest checkpoint, step_00000002" in caplog.text


def test_going_back_to_an_older_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20):
        save(folder, step)
    (tmp_path / "latest").write_text("step_00000010\n")
    assert content(folder.latest()) == "step 10"
    save(folder, 15)
    # The abandoned step 20 is later than 15 and must not push it out.
    assert folder.steps() == [10, 15, 20]
    shutil.rmtree(tmp_path / "step_00000020" / "tensors")
    save(folder, 20)
    assert folder.steps() == [15, 20] and content(folder.latest()) == "step 20"


def test_room_is_made_by_what_the_commit_would_delete_and_nothing_else(tmp_path):
    every = CheckpointFolder(tmp_path, keep=9)
    for step in (50, 100, 200, 250):
        save(every, step)
    (tmp_path / "latest").write_text("step_00000100\n")
    # The abandoned steps after 150 stay and do not count; one that is being copied stays until it is.
    assert not CheckpointFolder(tmp_path, keep=3).make_room(150)
    assert not CheckpointFolder(tmp_path, keep=2, is_busy=lambda step: step == 50).make_room(150)
    assert every.steps() == [50, 100, 200, 250]
    assert CheckpointFolder(tmp_path, keep=3).make_room(200)
    assert every.steps() == [50, 100, 250], "the new one takes the place of the abandoned one"
    assert CheckpointFolder(tmp_path, keep=2).make_room(150)
    assert every.steps() == [100, 250]
    assert not CheckpointFolder(tmp_path, keep=1).make_room(150), "not the one that a run would resume from"


def test_a_checkpoint_that_latest_cannot_name_is_said_to_be_whole(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    write = checkpoint_folder.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "latest":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(checkpoint_folder, "write_text", full)
    with pytest.raises(CheckpointError) as caught:
        save(folder, 2)
    message = str(caught.value)
    assert "step_00000002 is whole, but a run would resume from step_00000001" in message
    assert "not committed" not in message and f"write step_00000002 into {tmp_path / 'latest'}" in message
    monkeypatch.undo()
    assert folder.steps() == [1, 2]


def test_what_a_deletion_left_is_removed(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    for left in ("step_00000000.deleting", "step_00000002.writing"):
        (tmp_path / left).mkdir()
    folder.remove_deleted()
    # What is being written may belong to a run that is under way.
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002.writing"]
