from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.integrity import file_digest, find_change
from bitdance_scale.checkpoint.sharded import save_sharded
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.parallel.partition import Piece, ShardedValue


def test_the_digest_taken_while_writing_is_that_of_the_file(tmp_path):
    # Several dtypes and sizes, and some of an odd length, which must not leave others unaligned.
    tensors = {
        "z": torch.arange(5, dtype=torch.uint8),
        "b": torch.randn(3, 1).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "a": torch.randn(4, dtype=torch.float64),
        "strided": torch.randn(4, 6)[:, ::2],
        "c": torch.arange(7, dtype=torch.int32),
    }
    values = {
        name: ShardedValue(tuple(tensor.shape), tensor.dtype, (Piece((0,) * tensor.dim(), tensor),))
        for name, tensor in tensors.items()
    }
    save_sharded(tmp_path, values)
    (file,) = set(read_index(tmp_path).files.values())
    path = tmp_path / file.name
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_digest(path)
    assert file.num_bytes == path.stat().st_size
    found = {name.partition("@")[0]: tensor for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_an_error_on_the_way_to_storage_is_noticed(tmp_path):
    values = {"a": ShardedValue((100,), torch.float32, (Piece((0,), torch.arange(100.0)),))}
    save_sharded(tmp_path, values)
    (file,) = set(read_index(tmp_path).files.values())
    path = tmp_path / file.name
    written = bytearray(path.read_bytes())
    written[-1] ^= 1
    path.write_bytes(written)
    assert "safetensors is damaged" in find_change(path, file.num_bytes, file.sha256)
