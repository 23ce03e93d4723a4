from __future__ import annotations

import json

import pytest
import torch

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import write_manifest
from bitdance_scale.checkpoint.run_checkpoint import TrainState, load_checkpoint, save_checkpoint
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.partition import Placement, ShardedValue, whole_pieces

STATE = TrainState(
    step=7,
    images=69,
    tokens=7000,
    loader={"step": 7},
    optimizer={"step": 6},
    tokenizer_digest="abc",
    images_by_resolution={"256": 14, "512": 55},
    skipped_samples=1,
)


def values(fill: float, width: int = 3) -> tuple[dict[str, ShardedValue], dict[str, ShardedValue]]:
    def one(dtype: torch.dtype) -> ShardedValue:
        return whole_pieces(torch.full((2, width), fill, dtype=dtype), Placement.replicated((2, width)))

    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {"w": one(torch.bfloat16)}, {f"{kind}.w": one(torch.float32) for kind in kinds}


def fill_of(group: dict[str, ShardedValue]) -> set[float]:
    return {float(x) for value in group.values() for piece in value.pieces for x in piece.tensor.unique()}


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    save_checkpoint(folder, STATE, *values(1.5), config_text="[run]\nname = 'x'\n")
    return folder


def test_round_trip(folder):
    model, optimizer = values(0.0)
    assert load_checkpoint(folder.latest(), model, optimizer, tokenizer_digest="abc") == STATE
    assert fill_of(model) == fill_of(optimizer) == {1.5}
    assert (folder.latest() / "config.toml").read_text() == "[run]\nname = 'x'\n"
    content = json.loads((folder.latest() / "train_state.json").read_text())
    assert {"config_sha256", "model_signature", "versions"} <= set(content)


def test_a_state_without_a_field_is_named(folder):
    path = folder.latest()
    text = (path / "train_state.json").read_text()
    (path / "train_state.json").write_text(text.replace('"step": 7', '"stap": 7', 1))
    # As a program with other fields would have written it: sealed, and not damaged.
    (path / "manifest.json").unlink()
    write_manifest(path)
    model, optimizer = values(0.0)
    with pytest.raises(CheckpointError, match="train_state.json: damaged .KeyError: 'step'"):
        load_checkpoint(path, model, optimizer, tokenizer_digest="abc")
    assert fill_of(model) == fill_of(optimizer) == {0.0}


def test_a_checkpoint_of_an_earlier_version_has_no_guards(folder):
    path = folder.latest()
    content = json.loads((path / "train_state.json").read_text())
    del content["guards"]
    (path / "train_state.json").write_text(json.dumps(content))
    (path / "manifest.json").unlink()
    write_manifest(path)
    assert load_checkpoint(path, *values(0.0), tokenizer_digest="abc").guards == {}


def test_signature_tells_models_apart(tmp_path, folder):
    def signature(path):
        return json.loads((path / "train_state.json").read_text())["model_signature"]

    other = CheckpointFolder(tmp_path / "other", keep=1)
    save_checkpoint(other, STATE, *values(9.0), config_text="")
    wider = CheckpointFolder(tmp_path / "wider", keep=1)
    save_checkpoint(wider, STATE, *values(1.5, width=4), config_text="")
    assert signature(other.latest()) == signature(folder.latest()) != signature(wider.latest())
