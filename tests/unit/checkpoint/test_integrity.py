from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save_file

from bitdance_scale.checkpoint.integrity import file_digest, find_change, saved_digest


def test_the_digest_of_what_is_saved_is_that_of_the_file(tmp_path):
    # Several dtypes, sizes and no alphabetical order: the file sorts them its own way.
    tensors = {
        "z": torch.arange(5, dtype=torch.uint8),
        "b": torch.randn(3, 2).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "a": torch.randn(4, dtype=torch.float64),
        "c": torch.arange(7, dtype=torch.int32),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_digest(path) == sha256
    assert saved_digest(path, tensors) == (path.stat().st_size, sha256)


def test_an_error_on_the_way_to_storage_is_noticed(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"a": torch.arange(100.0)}
    save_file(tensors, path)
    written = bytearray(path.read_bytes())
    written[-1] ^= 1
    path.write_bytes(written)
    assert "x.safetensors is damaged" in find_change(path, *saved_digest(path, tensors))
