"""The streaming writer makes what the safetensors library makes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitdance_scale.checkpoint.published_files import TensorFileWriter
from bitdance_scale.weight_files import TensorSpec

TENSORS = {
    "b": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a": torch.arange(7, dtype=torch.float32),
    "c": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).half(),
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(path, rows_per_piece: int):
    with TensorFileWriter(path, SPECS) as writer:
        for name, tensor in TENSORS.items():
            for piece in tensor.split(rows_per_piece):
                writer.write(name, piece.contiguous())
    return writer


@pytest.mark.parametrize("rows_per_piece", [1, 2, 100])
def test_the_library_reads_what_was_written(tmp_path, rows_per_piece):
    writer = write(tmp_path / "x.safetensors", rows_per_piece)
    found = load_file(tmp_path / "x.safetensors")
    assert {*found} == {*TENSORS}
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        content = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert writer.digests[name] == hashlib.sha256(content).hexdigest()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_values_out_of_turn_or_too_many_are_refused(tmp_path):
    with TensorFileWriter(tmp_path / "x", SPECS) as writer:
        with pytest.raises(AssertionError, match="a is not the tensor whose turn it is"):
            writer.write("a", TENSORS["a"])
        with pytest.raises(AssertionError, match="b: torch.float32 for torch.bfloat16"):
            writer.write("b", TENSORS["b"].float())
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    with pytest.raises(AssertionError, match="c is not whole"), TensorFileWriter(tmp_path / "y", SPECS) as writer:
        writer.write("b", TENSORS["b"])
        writer.write("a", TENSORS["a"])
        writer.write("c", TENSORS["c"][:1])


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError), TensorFileWriter(tmp_path / "x", SPECS):
        pass
    assert (tmp_path / "x").read_text() == "mine"
