"""What is no sound checkpoint of this model is refused by file and reason; tensors and run folder stay as they were."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint import run_checkpoint
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import file_digest, write_manifest
from bitdance_scale.checkpoint.run_checkpoint import TrainState, load_checkpoint, save_checkpoint
from bitdance_scale.checkpoint.sharded import save_sharded
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.partition import Placement, ShardedValue, whole_pieces

STATE = TrainState(step=7, images=69, tokens=7000, loader={"step": 7}, optimizer={"step": 6}, tokenizer_digest="abc")
TENSORS = ("rank00000_000.safetensors", "rank00000_001.safetensors")
Values = dict[str, ShardedValue]


def make_values(fill: float, shape: tuple[int, ...] = (4, 3)) -> tuple[Values, Values]:
    def one(dtype: torch.dtype) -> ShardedValue:
        numbers = torch.arange(12, dtype=torch.float32).reshape(shape) + fill
        return whole_pieces(numbers.to(dtype), Placement.replicated(shape))

    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {"w": one(torch.bfloat16)}, {f"{kind}.w": one(torch.float32) for kind in kinds}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of two checkpoints, whose tensors fill several files."""
    monkeypatch.setattr(run_checkpoint, "save_sharded", functools.partial(save_sharded, max_file_bytes=100))
    for step in (3, 7):
        progress = dataclasses.replace(STATE, step=step)
        save_checkpoint(CheckpointFolder(tmp_path, keep=2), progress, *make_values(1.5), config_text="[run]\n")
    return tmp_path


def snapshot(root: Path) -> dict[str, object]:
    """Everything that a look at the folder can tell."""
    entries = {}
    for path in sorted(root.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        entries[path.relative_to(root).as_posix()] = (path.lstat().st_mode, path.lstat().st_mtime_ns, content)
    return entries


def contents(groups: tuple[Values, Values]) -> dict[str, torch.Tensor]:
    return {name: piece.tensor.clone() for group in groups for name, value in group.items() for piece in value.pieces}


def resume(root: Path, groups: tuple[Values, Values]) -> TrainState:
    path = CheckpointFolder(root, keep=2).latest()
    return load_checkpoint(path, *groups, tokenizer_digest="abc")


def assert_refused(root: Path, message: str) -> None:
    groups = make_values(-9.0)
    before, tensors = snapshot(root), contents(groups)
    with pytest.raises(CheckpointError, match=message):
        resume(root, groups)
    assert snapshot(root) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in contents(groups).items())


def test_what_is_not_damaged_is_loaded(root):
    groups = make_values(-9.0)
    assert resume(root, groups) == STATE
    expected = contents(make_values(1.5))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in contents(groups).items())
    assert {path.name for path in root.glob("step_00000007/tensors/rank*")} == set(TENSORS)


@pytest.mark.parametrize(
    "name", ["tensors/" + TENSORS[0], "tensors/" + TENSORS[1], "tensors/index.json", "train_state.json", "config.toml"]
)
def test_one_flipped_bit_anywhere_in_a_file_is_noticed(root, name):
    path = root / "step_00000007" / name
    written = path.read_bytes()
    # Every seventh byte: headers, values, names and numbers, each with another bit.
    for position in range(0, len(written), 7):
        damaged = bytearray(written)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert_refused(root, f"{path.name} is damaged: its SHA-256 is not that of what was written")
    path.write_bytes(written)
    assert resume(root, make_values(0.0)) == STATE


def test_a_flipped_bit_in_the_manifest_accuses_the_manifest(root):
    path = root / "step_00000007" / "manifest.json"
    written = path.read_bytes()
    for position in range(len(written)):
        damaged = bytearray(written)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            is_harmless = json.loads(damaged) == json.loads(written)
        except ValueError:
            is_harmless = False
        if is_harmless:
            assert chr(written[position]).isspace()
        else:
            assert_refused(root, r"manifest.json (is damaged|has version)")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, 50)


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _be_another_folder(path: Path) -> None:
    _empty(path)
    (path / "notes.txt").write_text("not a checkpoint")


def _be_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


def _be_version_1(path: Path) -> None:
    """As the first version of this program wrote it: sizes only."""
    (path / "manifest.json").write_text(json.dumps({"files": {"config.toml": 6}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove(f"tensors/{TENSORS[1]}"), "rank00000_001.safetensors is missing"),
        (_remove("tensors/index.json"), "index.json is missing"),
        (_remove("train_state.json"), "train_state.json is missing"),
        (_truncate(f"tensors/{TENSORS[0]}"), r"rank00000_000.safetensors has 50 bytes, \d+ were written"),
        (_truncate("tensors/index.json"), r"index.json has 50 bytes, \d+ were written"),
        (_truncate("train_state.json"), r"train_state.json has 50 bytes, \d+ were written"),
        (_truncate("manifest.json"), "manifest.json is damaged .JSONDecodeError"),
        (_write("manifest.json", b"\xff\xfe\x00"), "manifest.json is damaged .UnicodeDecodeError"),
        (_write("manifest.json", b"[" * 100_000), "manifest.json is damaged .RecursionError"),
        (_write("manifest.json", b"[]"), "manifest.json is damaged .AttributeError"),
        (_empty, "manifest.json is missing"),
        (_be_another_folder, "manifest.json is missing"),
        (_be_a_file, "manifest.json is damaged .NotADirectoryError"),
        (shutil.rmtree, "there is no such checkpoint"),
        (_be_version_1, "manifest.json has version 1, this program reads version 2: use the program that wrote it"),
    ],
)
def test_a_partial_or_foreign_folder_is_named_with_the_way_back(root, damage, message):
    damage(root / "step_00000007")
    assert_refused(root, f"{message}.*; step_00000003 is whole: .* write step_00000003 into .*latest")


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        (b"step_00000007.writing\n", "step_00000007.writing: not the name of a checkpoint"),
        (b"../step_00000007\n", "not the name of a checkpoint"),
        (b"/elsewhere/step_00000007\n", "not the name of a checkpoint"),
        (b"step_00000007/../../elsewhere\n", "not the name of a checkpoint"),
        (b"step_00000009\n", "step_00000009: there is no such checkpoint"),
        (b"\xff\xfe\n", "latest cannot be read .UnicodeDecodeError"),
    ],
)
def test_a_pointer_elsewhere_is_refused(root, pointer, message):
    (root / "step_00000007.writing").mkdir()
    (root / "latest").write_bytes(pointer)
    assert_refused(root, message)


def test_leftovers_of_a_killed_save_are_neither_read_nor_touched(root):
    shutil.copytree(root / "step_00000003", root / "step_00000009.writing")
    shutil.copytree(root / "step_00000003", root / "step_00000001.deleting")
    before = snapshot(root)
    assert resume(root, make_values(0.0)) == STATE
    assert snapshot(root) == before


def edit_index(path: Path, change: Callable[[dict], None]) -> None:
    """Changes the index and seals the checkpoint again: not damaged, but written by a foreign or faulty program."""
    file = path / "tensors" / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    (path / "manifest.json").unlink()
    write_manifest(path)


def _chunks(*boxes: list) -> Callable[[dict], None]:
    return lambda index: index["tensors"]["model.w"].update(chunks=list(boxes))


def _name_file(name: str) -> Callable[[dict], None]:
    return lambda index: index["files"][0].__setitem__(0, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index.update(version=1),
            "version 1, this program reads version 2; use the program that wrote it",
        ),
        (_name_file("../" + TENSORS[0]), "'../rank00000_000.safetensors' is not one of this folder"),
        (_name_file("/elsewhere/" + TENSORS[0]), "'/elsewhere/rank00000_000.safetensors' is not one of this folder"),
        (_name_file(".."), "'..' is not one of this folder"),
        (lambda index: index["files"][0].pop(), "TypeError"),
        (lambda index: index["files"][0].__setitem__(2, "no digest"), "is not a size and a SHA-256"),
        (_chunks([[0, 0], [3, 3], 0]), "do not add up to its shape .4, 3."),
        (_chunks([[0, 0], [3, 3], 0], [[2, 0], [1, 3], 0]), r"offsets=\(2, 0\).* overlap"),
        (_chunks([[0, 0], [4, 3], 0], [[0, 0], [4, 3], 0]), "do not add up"),
        (_chunks([[1, 0], [4, 3], 0]), "leaves its shape"),
        (_chunks([[-1, 0], [4, 3], 0]), "leaves its shape"),
        (_chunks([[0, 0], [4, 3]]), "ValueError"),
        (_chunks([[0], [4], 0]), "ValueError"),
        (_chunks([[0, 0], [4, 3], 99]), "IndexError"),
        (lambda index: index["tensors"]["model.w"].update(dtype="object"), "KeyError: 'object'"),
        (lambda index: index.update(tensors=[]), "AttributeError"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(root, change, message):
    edit_index(root / "step_00000007", change)
    assert_refused(root, f"index.json: .*{message}")


def rewrite_tensors(path: Path, change: Callable[[Path], None]) -> None:
    """Changes a file of tensors and seals the checkpoint again."""
    file = path / "tensors" / TENSORS[0]
    change(file)

    def seal(index: dict) -> None:
        index["files"][0] = [file.name, file.stat().st_size, file_digest(file)]

    edit_index(path, seal)


def _flat(file: Path) -> None:
    save_file({name: tensor.reshape(-1) for name, tensor in load_file(file).items()}, file)


def _half_precision(file: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_half_precision, r"model.w@0,0 is F16, not torch.bfloat16"),
        (_flat, r"is \[12\], not \[4, 3\]"),
        (lambda file: save_file({"other": torch.zeros(1)}, file), "does not contain tensor model.w@0,0"),
        (lambda file: file.write_bytes(b"\xff" * 60), "header"),
    ],
    ids=["dtype", "shape", "name", "header"],
)
def test_a_tensor_file_that_disagrees_with_the_index_is_refused(root, change, message):
    rewrite_tensors(root / "step_00000007", change)
    assert_refused(root, f"rank00000_000.safetensors: cannot be read .*{message}")


def test_another_model_or_tokenizer_leaves_all_as_it_was(root):
    before = snapshot(root)
    path = CheckpointFolder(root, keep=2).latest()
    for groups, digest, message in [
        (make_values(-9.0, shape=(3, 4)), "abc", r"model.w: shape \[4, 3\] in the checkpoint, \[3, 4\] in this model"),
        (make_values(-9.0), "xyz", r"another text tokenizer \(digest abc, in use xyz\)"),
    ]:
        tensors = contents(groups)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, *groups, tokenizer_digest=digest)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in contents(groups).items())
    assert snapshot(root) == before


def test_another_vision_tokenizer_is_refused_and_an_unknown_one_warned_of(tmp_path, caplog):
    for step, digest in ((3, ""), (7, "v1")):
        state = dataclasses.replace(STATE, step=step, vision_digest=digest)
        save_checkpoint(CheckpointFolder(tmp_path, keep=2), state, *make_values(1.5), config_text="[run]\n")
    groups = make_values(-9.0)
    load_checkpoint(tmp_path / "step_00000007", *groups, tokenizer_digest="abc", vision_digest="v1")
    assert "vision tokenizer" not in caplog.text
    load_checkpoint(tmp_path / "step_00000003", *groups, tokenizer_digest="abc", vision_digest="v1")
    assert "does not say which vision tokenizer it was trained with" in caplog.text
    with pytest.raises(CheckpointError, match=r"another vision tokenizer \(digest v1, in use v2\)"):
        load_checkpoint(tmp_path / "step_00000007", *groups, tokenizer_digest="abc", vision_digest="v2")


def test_a_checkpoint_of_an_earlier_version_has_no_vision_digest(root):
    edit_state(root, lambda state: state.pop("vision_digest"))
    assert resume(root, make_values(0.0)) == STATE


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", -5, "step is -5, expected a count"),
        ("step", 6, "step is 6, but the checkpoint is step_00000007"),
        ("step", 7.0, "step is 7.0, expected a count"),
        ("step", True, "step is True, expected a count"),
        ("images", "69", "images is '69', expected a count"),
        ("tokens", None, "tokens is None, expected a count"),
        ("loader", [], r"loader is \[\], expected of type dict"),
        ("tokenizer_digest", 5, "tokenizer_digest is 5, expected of type str"),
        ("optimizer", {"step": -1}, "optimizer.step is -1, expected a count"),
        ("optimizer", {"step": 1, "skipped_steps": "x"}, "optimizer.skipped_steps is 'x', expected a count"),
        ("images_by_resolution", {"64": 1.5}, "images_by_resolution.64 is 1.5, expected a count"),
        ("images_by_resolution", {"a": 1}, "images_by_resolution has 'a', expected a side in pixels"),
        ("sample_errors", {"x": -1}, "sample_errors.x is -1, expected a count"),
        ("skipped_samples", -1, "skipped_samples is -1, expected a count"),
    ],
)
def test_values_that_no_run_has_are_refused(root, field, value, message):
    edit_state(root, lambda state: state.update({field: value}))
    assert_refused(root, f"train_state.json: damaged .*{message}")


@pytest.mark.parametrize("name", ["tensors/" + TENSORS[0], "tensors/index.json", "train_state.json", "manifest.json"])
def test_a_link_is_not_followed(root, tmp_path_factory, name):
    path = root / "step_00000007" / name
    elsewhere = tmp_path_factory.mktemp("elsewhere") / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert_refused(root, f"{path.name} is a symbolic link, which is not followed")
    if "rank" in name:
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            StoredTensors(path.parent)


def test_a_link_to_all_tensors_is_not_followed(root, tmp_path_factory):
    path = root / "step_00000007" / "tensors"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "tensors"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert_refused(root, "tensors is a symbolic link, which is not followed")


def test_a_pipe_is_not_waited_for(root):
    path = root / "step_00000007" / "tensors" / TENSORS[0]
    path.unlink()
    os.mkfifo(path)
    groups = make_values(-9.0)
    with pytest.raises(CheckpointError, match="is no regular file"):
        resume(root, groups)
    path.unlink()


def edit_state(root: Path, change: Callable[[dict], object]) -> None:
    """Changes the state of the newest checkpoint as someone with an editor would, and its manifest with it."""
    folder = root / "step_00000007"
    state = json.loads((folder / "train_state.json").read_text())
    change(state)
    (folder / "train_state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
