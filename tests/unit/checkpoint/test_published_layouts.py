"""Folders as they are published, and what other downloads leave in them: read as transformers reads it, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import NewParts, Source, open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.cli.import_release import main
from bitdance_scale.errors import BitDanceError, CheckpointError
from tests.handwritten import Tensors, random_tensor, write_index, write_qwen3, write_safetensors
from tests.released import edit_config, read_json, write_autoencoder, write_published

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("released") / "published")


@pytest.fixture
def release(published, tmp_path) -> Path:
    """A published folder to change."""
    return shutil.copytree(published, tmp_path / "release")


def opened(folder: Path, autoencoder: Path) -> Source:
    return open_source(folder, NewParts(autoencoder=autoencoder, head_width=128, head_blocks=2, head_adaln=1))


def split(folder: Path, tensors: Tensors) -> tuple[list[str], list[str]]:
    """Puts the tensors of a folder in two files with an index, as large models are; returns the names in each."""
    names = [*tensors]
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder / "model.safetensors.index.json", weight_map)
    (folder / "model.safetensors").unlink()
    return parts


class TestTied:
    def test_an_equal_copy_of_the_embedding_is_left_out(self, tmp_path, autoencoder):
        tensors = write_qwen3(tmp_path / "qwen3")
        stored = {**tensors, OUTPUT: tensors[EMBEDDING]}
        write_safetensors(tmp_path / "qwen3" / "model.safetensors", stored, {"format": "pt"})
        source = opened(tmp_path / "qwen3", autoencoder)
        import_release(source, tmp_path / "run")
        assert source.network.model.tie_embeddings
        found = StoredTensors(find_checkpoint(tmp_path / "run") / "tensors")
        assert not any("output" in name for name in found.index.tensors)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3", dtype=torch.bfloat16)
        assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
        num_old = source.num_old_rows
        assert torch.equal(found.read_rows("model.embedding.weight", 0, num_old), theirs.lm_head.weight[:num_old])
        digests = read_json(tmp_path / "run" / "conversion_report.json")["tensor_sha256"]
        assert EMBEDDING in digests and OUTPUT not in digests

    def test_a_copy_in_another_file_is_compared_too(self, tmp_path, autoencoder):
        tensors = write_qwen3(tmp_path / "qwen3")
        split(tmp_path / "qwen3", {**tensors, OUTPUT: tensors[EMBEDDING]})
        assert opened(tmp_path / "qwen3", autoencoder).network.model.tie_embeddings

    def test_a_tied_model_without_a_copy(self, tmp_path, autoencoder):
        write_qwen3(tmp_path / "qwen3")
        assert opened(tmp_path / "qwen3", autoencoder).network.model.tie_embeddings

    def test_one_other_value_is_found(self, tmp_path, autoencoder):
        tensors = write_qwen3(tmp_path / "qwen3")
        dtype, shape, values = tensors[EMBEDDING]
        changed = values[:-1] + bytes([values[-1] ^ 1])
        stored = {**tensors, OUTPUT: (dtype, shape, changed)}
        write_safetensors(tmp_path / "qwen3" / "model.safetensors", stored, {"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            opened(tmp_path / "qwen3", autoencoder)
        message = str(caught.value)
        assert "lm_head.weight has other values than model.embed_tokens.weight" in message
        assert "tie_word_embeddings = true in config.json" in message and "Set it to false" in message
        # The way out that it names.
        edit_config(tmp_path / "qwen3", tie_word_embeddings=False)
        assert not opened(tmp_path / "qwen3", autoencoder).network.model.tie_embeddings

    def test_a_copy_of_another_shape(self, tmp_path, autoencoder):
        tensors = write_qwen3(tmp_path / "qwen3")
        stored = {**tensors, OUTPUT: random_tensor(1, 8, 32)}
        write_safetensors(tmp_path / "qwen3" / "model.safetensors", stored, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lm_head.weight is torch.bfloat16 \[8, 32\] and model.embed_tokens"):
            opened(tmp_path / "qwen3", autoencoder)

    def test_an_untied_model_needs_its_output(self, tmp_path, autoencoder):
        write_qwen3(tmp_path / "qwen3")
        edit_config(tmp_path / "qwen3", tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match="lm_head.weight is missing"):
            opened(tmp_path / "qwen3", autoencoder)


class TestStaleFiles:
    def test_one_file_beside_an_index_of_others(self, tmp_path, autoencoder):
        folder = tmp_path / "qwen3"
        tensors = write_qwen3(folder)
        split(folder, tensors)
        stale = {**tensors, "model.norm.weight": random_tensor(9, 32)}
        write_safetensors(folder / "model.safetensors", stale, {"format": "pt"})
        # transformers takes the one file: the index would be another model.
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.equal(theirs.model.norm.weight, load_file(folder / "model.safetensors")["model.norm.weight"])
        with pytest.raises(CheckpointError) as caught:
            opened(folder, autoencoder)
        assert "holds model.safetensors and model.safetensors.index.json, which names other files" in str(caught.value)
        assert "Remove model.safetensors or model.safetensors.index.json" in str(caught.value)
        (folder / "model.safetensors").unlink()
        assert opened(folder, autoencoder).kind == "Qwen3"

    def test_an_index_that_names_the_one_file(self, tmp_path, autoencoder):
        tensors = write_qwen3(tmp_path / "qwen3")
        write_index(tmp_path / "qwen3" / "model.safetensors.index.json", dict.fromkeys(tensors, "model.safetensors"))
        assert opened(tmp_path / "qwen3", autoencoder).kind == "Qwen3"

    def test_pickles_beside_safetensors_are_not_read(self, tmp_path, autoencoder):
        write_qwen3(tmp_path / "qwen3")
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "ae.pt"):
            (tmp_path / "qwen3" / name).write_bytes(b"\x80\x02not a pickle")
        assert opened(tmp_path / "qwen3", autoencoder).kind == "Qwen3"

    def test_pickles_alone_are_named(self, tmp_path, autoencoder):
        write_qwen3(tmp_path / "qwen3")
        (tmp_path / "qwen3" / "model.safetensors").rename(tmp_path / "qwen3" / "pytorch_model.bin")
        with pytest.raises(
            CheckpointError, match=r"only safetensors are read \(not pytorch_model.bin, which must be unp"
        ):
            opened(tmp_path / "qwen3", autoencoder)

    def test_a_listed_file_that_is_not_there(self, tmp_path, autoencoder):
        split(tmp_path / "qwen3", write_qwen3(tmp_path / "qwen3"))
        (tmp_path / "qwen3" / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=r"index.json: names model-00002-of-00002.safetensors, and there is no"
        ):
            opened(tmp_path / "qwen3", autoencoder)

    def test_a_tensor_in_two_files(self, tmp_path, autoencoder):
        folder = tmp_path / "qwen3"
        tensors = write_qwen3(folder)
        first, second = split(folder, tensors)
        both = {name: tensors[name] for name in [*second, first[0]]}
        write_safetensors(folder / "model-00002-of-00002.safetensors", both, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{first[0]} is in the file, not in model.safetensors.index.json"):
            opened(folder, autoencoder)

    @pytest.mark.parametrize(
        "name", ["../other/model.safetensors", "/tmp/model.safetensors", "a/b.safetensors", "..", ""]
    )
    def test_an_index_that_points_outside(self, tmp_path, autoencoder, name):
        tensors = write_qwen3(tmp_path / "qwen3")
        (tmp_path / "qwen3" / "model.safetensors").unlink()
        write_index(tmp_path / "qwen3" / "model.safetensors.index.json", dict.fromkeys(tensors, name))
        with pytest.raises(CheckpointError, match="index.json"):
            opened(tmp_path / "qwen3", autoencoder)

    @pytest.mark.parametrize("part", ["vision_head", "projector", "ae"])
    @pytest.mark.parametrize("keeps_file", [True, False])
    def test_parts_that_are_in_one_file(self, release, part, keeps_file):
        file = release / f"{part}.safetensors"
        names = [*load_file(file)]
        if not keeps_file:
            file.rename(release / f"{part}-00001-of-00001.safetensors")
        write_index(
            release / f"{part}.safetensors.index.json", dict.fromkeys(names, f"{part}-00001-of-00001.safetensors")
        )
        with pytest.raises(BitDanceError, match=f"{part}.safetensors"):
            open_source(release, None)


def test_missing_keys_of_a_release_are_filled_in_and_said(release, tmp_path, capsys):
    for key in ("P_mean", "P_std", "time_shift", "time_schedule", "diff_batch_mul", "grad_checkpointing"):
        edit_config(release, "vision_head_config.json", **{key: None})
    edit_config(release, "ae_config.json", gan_decoder=None)
    edit_config(release, unsloth_version="2025.6")
    assert main([str(release), str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().err
    assert "note: flow times in training: time_schedule logit_normal, P_mean 0.0, P_std 1.0, time_shift 1.0" in printed
    assert "head.time_mean=-0.8 head.time_std=0.8" in printed
    assert "config.json: ignored, as transformers' Qwen3 ignores them: unsloth_version" in printed
    config = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    assert "time_mean = 0.0" in config and "time_std = 1.0" in config and "gan_decoder = false" in config
    assert len(read_json(tmp_path / "run" / "conversion_report.json")["notes"]) == 2
