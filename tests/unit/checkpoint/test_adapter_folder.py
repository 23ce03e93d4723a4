"""What an export of adapters writes, and which folders of adapters are refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.export_adapter import export_adapter
from bitdance_scale.checkpoint.export_card import ShareOptions
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.run_adapters import open_run_adapters
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.published_model import load_published
from bitdance_scale.model.adapter_folder import open_adapter_folder
from bitdance_scale.model.published_names import Part
from tests.adapted import LORA, write_adapted_run
from tests.released import edit_config, read_json, scale_backbone, write_published

ALL = dataclasses.replace(LORA, train_projector=True, train_queries=True)


@pytest.fixture(scope="module")
def run(imported, tmp_path_factory) -> Path:
    return write_adapted_run(imported, tmp_path_factory.mktemp("runs") / "style", ALL, is_averaged=True)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "style"
    export_adapter(open_run_adapters(run, weights="trained"), out)
    return out


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def from_peft(copy) -> Path:
    """What PEFT would have written of the same."""
    for path in copy.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()
    return copy


def test_what_an_export_holds(published, run, folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "LICENSE",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "bitdance_adapter.json",
        "conversion_report.json",
        "head_adapter.safetensors",
        "projector.safetensors",
        "query_tokens.safetensors",
    }
    backbone, head = (load_file(folder / f"{name}.safetensors") for name in ("adapter_model", "head_adapter"))
    assert len(backbone) == 2 * 4 * 5
    assert backbone["base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"].shape == (64, 3)
    assert head["net.res_blocks.0.w1.lora_A.weight"].shape == (3, 128)
    assert {tensor.dtype for tensor in (backbone | head).values()} == {torch.float32}
    assert load_file(folder / "projector.safetensors").keys() == load_file(published / "projector.safetensors").keys()
    assert load_file(folder / "query_tokens.safetensors")["query_deltas.weight"].shape == (15, 64)
    facts = read_json(folder / "bitdance_adapter.json")
    assert (facts["rank"], facts["alpha"], facts["rank_stabilized"]) == (3, 6.0, True)
    assert facts["base"]["name"] == str(published)
    assert facts["base"]["sizes"]["vision.block_side"] == 4
    report = read_json(folder / "conversion_report.json")
    assert (report["weights"], report["step"], report["run"]["is_finished"]) == ("trained", 3, True)


def test_its_card_says_what_it_is_and_whose(folder, run, tmp_path):
    card = (folder / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["library_name"] == "peft" and "lora" in fields["tags"] and "base_model" not in fields
    assert "rank 3" in card and "| rank of the adapters | 3 |" in card and "No licence is stated" in card
    out = tmp_path / "named"
    options = ShareOptions(licence="apache-2.0", model_name="Corners", base_model="someone/base", authors=("A. B.",))
    _, facts = export_adapter(open_run_adapters(run), out, options=options)
    card = (out / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(card.split("---\n")[1])
    assert (fields["base_model"], fields["base_model_relation"]) == ("someone/base", "adapter")
    assert fields["license"] == facts.licence.id == "apache-2.0" and "# Corners" in card and "A. B." in card


def test_which_weights_and_dtypes(run, folder, tmp_path):
    """Averages by default; float32 of the masters unless another dtype is asked for."""
    averaged, narrow = tmp_path / "averaged", tmp_path / "narrow"
    export_adapter(open_run_adapters(run), averaged)
    export_adapter(open_run_adapters(run, weights="trained"), narrow, dtypes={Part.BACKBONE: "bfloat16"})
    trained = load_file(folder / "adapter_model.safetensors")
    assert not torch.equal(
        next(iter(load_file(averaged / "adapter_model.safetensors").values())), trained[min(trained)]
    )
    for name, tensor in load_file(narrow / "adapter_model.safetensors").items():
        assert torch.equal(tensor, trained[name].bfloat16())
    assert load_file(narrow / "head_adapter.safetensors")["net.res_blocks.0.w1.lora_A.weight"].dtype == torch.float32


def test_only_adapters_of_the_backbone_or_the_head(imported, tmp_path):
    for name, targets, files in (
        ("head", ("head.*.w1",), {"head_adapter.safetensors"}),
        ("backbone", ("q_proj",), {"adapter_model.safetensors", "adapter_config.json"}),
    ):
        run = write_adapted_run(imported, tmp_path / f"{name}_run", dataclasses.replace(LORA, targets=targets))
        export_adapter(open_run_adapters(run), tmp_path / name)
        found = {path.name for path in (tmp_path / name).iterdir()}
        assert found == files | {"bitdance_adapter.json", "conversion_report.json", "LICENSE", "README.md"}
        assert len(open_adapter_folder(tmp_path / name).matrices) == (2 if name == "head" else 4)


def test_a_folder_a_run_and_a_checkpoint_are_the_same(run, folder):
    named = parse_adapters([str(folder), f"{run}=0.5"])
    assert [adapter.weight for adapter in named] == [1.0, 0.5]
    assert open_run_adapters(run, weights="trained").source.digest() == named[0].source.digest()
    assert named[1].source.digest() != named[0].source.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "--adapter nowhere: there is no nowhere"),
        ("nowhere=0.5", "there is no nowhere; name a folder"),
        ("{folder}=much", "'much' is no finite number"),
        ("{folder}=nan", "'nan' is no finite number"),
        ("{published}", "it is a Hugging Face folder"),
        ("{imported}", "is of a run without adapters"),
    ],
)
def test_what_is_named_is_refused(folder, published, imported, text, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        parse_adapters([text.format(folder=folder, published=published, imported=imported)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True: DoRA also scales"),
        ({"bias": "all"}, "bias = 'all': it has biases"),
        ({"lora_bias": True}, "its B matrices have biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside the adapters"),
        ({"trainable_token_indices": [1]}, "embeddings of tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': it belongs to weights"),
        ({"layer_replication": [[0, 2]]}, "copied layers"),
        ({"use_something_new": True}, "use_something_new = True: what it changes is not known here"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA': only adapters of type LORA"),
        ({"r": 0}, "r = 0: must be a rank"),
        ({"lora_alpha": "much"}, "lora_alpha = 'much'"),
        ({"rank_pattern": {"(": 2}}, "which is no regular expression"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj are \[3, 64\] and \[128, 3\]; rank 2 makes them \[2, in\]"),
        ({"r": 4}, r"rank 4 makes them"),
    ],
)
def test_a_configuration_of_something_else_is_refused(from_peft, changes, message):
    edit_config(from_peft, "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_adapter_folder(from_peft)


def test_patterns_of_ranks_and_scales(from_peft):
    path = from_peft / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{matrix}.weight" for matrix in "AB")
    tensors |= {a: tensors[a][:2].clone(), b: tensors[b][:, :2].clone()}
    save_file(tensors, path)
    pattern = r"layers\.1\.self_attn\.q_proj"
    edit_config(from_peft, "adapter_config.json", rank_pattern={pattern: 2}, alpha_pattern={"v_proj": 12})
    found = open_adapter_folder(from_peft).matrices
    assert found["model.layers.1.self_attn.q_proj"].scale == pytest.approx(6 / 2**0.5)
    assert found["model.layers.0.self_attn.q_proj"].scale == pytest.approx(6 / 3**0.5)
    assert found["model.layers.1.self_attn.v_proj"].scale == pytest.approx(12 / 3**0.5)


def test_adapters_of_a_model_without_its_output_projection(from_peft, published):
    """PEFT over Qwen3Model leaves out the beginning of the names."""
    path = from_peft / "adapter_model.safetensors"
    tensors = {name.replace("model.model.model.", "model.model."): tensor for name, tensor in load_file(path).items()}
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    save_file(tensors, path)
    assert "model.layers.0.self_attn.q_proj" in open_adapter_folder(from_peft).matrices


def _damage_name(folder: Path) -> None:
    _edit(folder, "adapter_model.safetensors", lambda tensors: tensors.pop(min(tensors)))


def _edit(folder: Path, file: str, change) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: there is no such"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: there is no such file"),
        (lambda folder: (folder / "head_adapter.safetensors").unlink(), "not in the files, but in bitdance_adapter"),
        (lambda folder: (folder / "projector.safetensors").unlink(), "projector.safetensors: there is no such file"),
        (lambda folder: (folder / "query_tokens.safetensors").unlink(), "query_tokens.safetensors: there is no such"),
        (_damage_name, "has base_model.model.model.layers.0.mlp.down_proj.lora_B.weight alone"),
        (lambda folder: edit_config(folder, "adapter_config.json", lora_alpha=7), "take both files from one export"),
        (lambda folder: edit_config(folder, "bitdance_adapter.json", version=9), "version 9, this program reads"),
        (lambda folder: edit_config(folder, "bitdance_adapter.json", base={}), "damaged .KeyError"),
        (
            lambda folder: _edit(folder, "adapter_model.safetensors", lambda found: found.update(x=torch.ones(1))),
            "x is no lora_A or lora_B of a linear",
        ),
        (lambda folder: (folder / "x.safetensors").symlink_to("/dev/null"), "is a symbolic link"),
    ],
)
def test_a_damaged_folder_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        open_adapter_folder(copy)


def test_pickles_are_not_read(from_peft):
    (from_peft / "adapter_model.safetensors").rename(from_peft / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors are read .not adapter_model.bin"):
        open_adapter_folder(from_peft)


def test_numbers_that_are_none_are_refused(published, copy):
    name = "base_model.model.model.layers.2.mlp.gate_proj.lora_A.weight"
    _edit(copy, "adapter_model.safetensors", lambda found: found[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=re.escape(name) + ": has values that are not finite"):
        load_published(published, torch.float32, torch.device("cpu"), parse_adapters([str(copy)]))


def test_a_model_that_they_do_not_fit_is_refused(from_peft, published, folder, tmp_path):
    cpu = torch.device("cpu")

    def change(old: str, new: str):
        def renamed(tensors):
            for name in [name for name in tensors if old in name]:
                tensors[name.replace(old, new)] = tensors.pop(name)

        _edit(from_peft, "adapter_model.safetensors", renamed)

    change("layers.3.self_attn.q_proj", "layers.3.self_attn.query")
    with pytest.raises(CheckpointError, match=r"model.layers.3.self_attn.query is no linear of .*nearest are .*q_proj"):
        load_published(published, torch.float32, cpu, parse_adapters([str(from_peft)]))
    change("layers.3.self_attn.query", "layers.3.self_attn.k_proj")
    with pytest.raises(CheckpointError, match=r"k_proj is \[128, 64\] there, \[64, 64\] in"):
        load_published(published, torch.float32, cpu, parse_adapters([str(from_peft)]))
    other = write_published(tmp_path / "other", block_side=2)
    with pytest.raises(CheckpointError, match="vision.block_side is 4 of their base, 2 of .*Their base is .*published"):
        load_published(other, torch.float32, cpu, parse_adapters([str(folder)]))
    trained = scale_backbone(shutil.copytree(published, tmp_path / "trained"))
    with pytest.raises(CheckpointError, match=r"beside other weights than those of .*: 28 of 43 linears differ"):
        load_published(trained, torch.float32, cpu, parse_adapters([str(folder)]))


def test_facts_are_plain_json(folder):
    content = json.loads((folder / "bitdance_adapter.json").read_text())
    assert len(content["base"]["fingerprint"]) == 43
