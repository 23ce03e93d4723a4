"""Loading a published folder: every part as it was written, and every fault named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.published_model import load_describer, load_published
from tests.released import edit_config, qwen_like, write_published


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_published(folder, dtype, torch.device("cpu"))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of a file; None removes one. Dots in names are written as two underscores."""
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_are_those_of_the_files(tmp_path, is_tied):
    model = load(write_published(tmp_path, is_tied=is_tied))
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, stored[f"model.{name}"].float()), name
    for module, file in ((model.head, "vision_head"), (model.projector, "projector")):
        for name, tensor in load_file(tmp_path / f"{file}.safetensors").items():
            assert torch.equal(module.state_dict()[name], tensor), name
    assert model.backbone.config.rope_parameters["rope_theta"] == 1e6
    assert model.vision.section.block_side == 4
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_dtype_is_that_of_all_parts_but_not_of_the_rotary_frequencies(published):
    model = load(published, torch.bfloat16)
    for module in (model.backbone, model.head, model.projector, model.vision.autoencoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert model.backbone.rotary_emb.inv_freq.dtype is torch.float32


def test_a_backbone_in_several_files(published, folder):
    whole = Qwen3ForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    found = load(folder).backbone.state_dict()
    for name, tensor in load(published).backbone.state_dict().items():
        assert torch.equal(found[name], tensor), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.norm.weight"]
    edit_weights(folder / shard, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=f"{shard}: model.norm.weight is not in the file"):
        load(folder)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no name of a file in this folder"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "vision_head_config.json",
        "ae_config.json",
        "model.safetensors",
        "vision_head.safetensors",
        "projector.safetensors",
        "ae.safetensors",
    ],
)
def test_missing_and_damaged_files_are_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* no such file"):
        load(folder)


def test_a_pickle_is_never_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="model.safetensors: there is no such file, and only safetensors are read"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model", {"model__norm__weight": None}, "model.norm.weight is missing"),
        ("model", {"model__extra": torch.zeros(1)}, "model.extra is no tensor of this network"),
        ("model", {"model__norm__weight": torch.zeros(3)}, r"model.norm.weight has shape \[3\], expected \[64\]"),
        ("vision_head", {"net__cond_embed__bias": None}, "net.cond_embed.bias is missing"),
        (
            "vision_head",
            {"net__input_proj__weight": torch.zeros(128, 8)},
            r"has shape \[128, 8\], expected \[128, 16\]",
        ),
        ("projector", {"fc3__weight": torch.zeros(1)}, "fc3.weight is no tensor of this network"),
        ("ae", {"decoder__conv_in__weight": None}, "decoder.conv_in.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, file, changes, message):
    edit_weights(folder / f"{file}.safetensors", **changes)
    with pytest.raises(CheckpointError, match=f"{file}.safetensors.*{message}"):
        load(folder)


@pytest.mark.parametrize("num_more", [-1, 5])
def test_an_embedding_of_other_rows_than_entries_is_refused(folder, num_more):
    num_rows = json.loads((folder / "config.json").read_text())["vocab_size"] + num_more
    edit_config(folder, vocab_size=num_rows)
    with pytest.raises(CheckpointError, match=f"vocab_size = {num_rows} in config.json, its tokenizer has .* entries"):
        load(folder)


@pytest.mark.parametrize("block_tokens", [1, 4, 64])
@pytest.mark.parametrize("load", [load, lambda folder: load_describer(folder, torch.float32, torch.device("cpu"))])
def test_a_head_of_other_blocks_than_the_tokenizers_is_refused(folder, block_tokens, load):
    """Its tensors fit: their shapes do not depend on the size of a block."""
    edit_config(folder, "vision_head_config.json", parallel_num=block_tokens)
    message = f"15 query tokens, blocks of parallel_num = {block_tokens} tokens .* need {block_tokens - 1}"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_tokenizer_without_the_added_tokens_is_refused(folder):
    qwen_like().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="its tokenizer has 0 query tokens, .* need 15"):
        load(folder)


@pytest.mark.parametrize("block_side", [1, 2, 8])
def test_blocks_of_every_size_load(tmp_path, block_side):
    assert load(write_published(tmp_path, block_side=block_side)).vision.section.block_side == block_side


def test_one_file_beside_an_index_of_others_is_refused(folder):
    # transformers would take the one file, whatever the index says.
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds model.safetensors and model.safetensors.index.json"):
        load(folder)


def test_keys_that_the_release_has_defaults_for_may_be_missing(folder):
    edit_config(folder, "vision_head_config.json", time_shift=None, P_mean=None)
    edit_config(folder, "ae_config.json", gan_decoder=None)
    assert load(folder).head.time_shift == 1.0


def test_no_folder():
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load(Path("nowhere"))
