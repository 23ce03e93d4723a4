"""Files that come from someone else: what is not of the model, or no file, is refused in imports and exports."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.export_release import open_checkpoint
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.errors import CheckpointError
from tests.released import write_autoencoder


def test_an_export_with_another_autoencoder_is_refused(imported, tmp_path):
    other = write_autoencoder(tmp_path / "other")
    tensors = {name: -tensor for name, tensor in load_file(other).items()}
    save_file(tensors, other)
    with pytest.raises(CheckpointError, match="trained with another vision tokenizer"):
        open_checkpoint(imported, autoencoder=other)


def test_a_link_in_a_folder_from_elsewhere_is_not_followed(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "published")
    path = folder / "vision_head.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_head.safetensors is a symbolic link.*with files in it"):
        open_source(folder, None)


def test_the_links_of_hugging_faces_cache_are_followed(published, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(published.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_source(snapshot, None).kind == "BitDance"
