"""Adapters in the weights of what is exported: which bytes change, and what they become."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.export_adapter import export_adapter
from bitdance_scale.checkpoint.export_merged import merge_folder, merged_release, merged_run
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.integrity import tensor_bytes
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.run_adapters import open_run_adapters
from bitdance_scale.checkpoint.start_weights import NewQueries
from bitdance_scale.errors import CheckpointError
from bitdance_scale.model import low_rank
from bitdance_scale.model.low_rank import merged
from bitdance_scale.model.published_names import EMBEDDING, OUTPUT
from tests.adapted import LORA, write_adapted_run
from tests.released import write_published

ALL = dataclasses.replace(LORA, train_projector=True, train_queries=True)
FILES = ("model", "vision_head", "projector")


@pytest.fixture(scope="module")
def run(imported, tmp_path_factory) -> Path:
    return write_adapted_run(imported, tmp_path_factory.mktemp("runs") / "style", ALL, is_averaged=True)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "style"
    export_adapter(open_run_adapters(run, weights="trained"), out)
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    """Weights are merged a few rows at a time."""
    monkeypatch.setattr(low_rank, "_BLOCK_ELEMENTS", 640)


def export_merged(run: Path, out: Path, **options) -> Path:
    export_release(merged_run(open_run_adapters(run, **options)), out)
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file}/{name}": tensor for file in FILES for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in dtype, shape or a byte."""
    assert one.keys() == other.keys()
    described = [
        {name: (tensor.dtype, tensor.shape, bytes(tensor_bytes(tensor))) for name, tensor in tensors.items()}
        for tensors in (one, other)
    ]
    return [name for name, found in described[0].items() if found != described[1][name]]


def merged_by_hand(published: Path, adapters: Path) -> dict[str, torch.Tensor]:
    """Whole tensors of a published folder with the adapters of a folder, read with the library alone."""
    wanted = tensors_of(published)
    scale = 6.0 / 3**0.5
    for file, part, prefix in (
        ("adapter_model", "model", "base_model.model."),
        ("head_adapter", "vision_head", ""),
    ):
        matrices = load_file(adapters / f"{file}.safetensors")
        for name in [name for name in matrices if name.endswith(".lora_A.weight")]:
            linear = name.removesuffix(".lora_A.weight")
            weight = f"{part}/{linear.removeprefix(prefix)}.weight"
            b = matrices[f"{linear}.lora_B.weight"]
            wanted[weight] = merged(wanted[weight], matrices[name], b, scale)
    for name, tensor in load_file(adapters / "projector.safetensors").items():
        wanted[f"projector/{name}"] = tensor
    deltas = load_file(adapters / "query_tokens.safetensors")["query_deltas.weight"]
    table = wanted["model/model.embed_tokens.weight"]
    table[-len(deltas) :] = (table[-len(deltas) :].float() + deltas).to(table.dtype)
    return wanted


def test_a_merged_export_has_the_bytes_of_whole_tensors(published, run, folder, tmp_path):
    """The weights of the backbone are bfloat16, those of the head float32; tensors without adapters are the base's."""
    found = tensors_of(export_merged(run, tmp_path / "out", weights="trained"))
    assert same_bytes(found, merged_by_hand(published, folder)) == []
    changed = same_bytes(found, tensors_of(published))
    assert "model/model.layers.2.self_attn.q_proj.weight" in changed
    assert "vision_head/net.res_blocks.1.w2.weight" in changed
    assert "model/model.layers.2.self_attn.k_proj.weight" not in changed
    assert "model/lm_head.weight" not in changed


def test_row_by_row_as_in_blocks_of_the_whole(published, run, folder, tmp_path, small_blocks):
    """Blocks of few rows, which begin within the heads that our tensors stack."""
    found = tensors_of(export_merged(run, tmp_path / "out", weights="trained"))
    assert same_bytes(found, merged_by_hand(published, folder)) == []


def test_what_small_weights_become_is_one_sum():
    torch.manual_seed(0)
    weight, a, b = torch.randn(48, 40), torch.randn(4, 40), torch.randn(48, 4)
    assert torch.equal(merged(weight, a, b, 0.3), weight + (b @ a) * 0.3)
    found = merged(weight.bfloat16(), a, b, 0.3)
    assert torch.equal(found, (weight.bfloat16().float() + (b @ a) * 0.3).bfloat16())


def test_averaged_weights_are_merged_by_default(run, folder, tmp_path):
    trained = tensors_of(export_merged(run, tmp_path / "trained", weights="trained"))
    averaged = tensors_of(export_merged(run, tmp_path / "averaged"))
    assert [
        json.loads((tmp_path / name / "conversion_report.json").read_text())["weights"]
        for name in ("trained", "averaged")
    ] == ["trained", "averaged"]
    assert "are the averaged ones of run" in (tmp_path / "averaged" / "README.md").read_text()
    assert "model/model.layers.2.self_attn.q_proj.weight" in same_bytes(trained, averaged)


def test_a_merged_export_imports_and_gives_its_bytes_back(run, tmp_path):
    merged_folder = export_merged(run, tmp_path / "out")
    import_release(open_source(merged_folder, None), tmp_path / "again")
    export_release(open_checkpoint(tmp_path / "again"), tmp_path / "back")
    assert same_bytes(tensors_of(merged_folder), tensors_of(tmp_path / "back")) == []


def test_a_folder_of_adapters_merges_into_a_folder_and_an_import(published, imported, run, folder, tmp_path):
    wanted = tensors_of(export_merged(run, tmp_path / "out", weights="trained"))
    adapters = parse_adapters([str(folder)])
    merge_folder(published, adapters, tmp_path / "folder")
    assert same_bytes(tensors_of(tmp_path / "folder"), wanted) == []
    export_release(merged_release(open_checkpoint(imported), adapters), tmp_path / "import")
    assert same_bytes(tensors_of(tmp_path / "import"), wanted) == []
    names = {path.name for path in published.iterdir()}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == names | {
        "conversion_report.json",
        "README.md",
        "LICENSE",
    }
    # It is a folder as any other.
    open_source(tmp_path / "folder", None)


def test_several_adapters_add_up_by_their_weights(published, imported, run, folder, tmp_path):
    plain = dataclasses.replace(LORA, targets=("q_proj",), rank=2, alpha=2.0)
    other = write_adapted_run(imported, tmp_path / "other", plain, seed=5)
    merge_folder(published, parse_adapters([f"{folder}=0.5", f"{other}=-2"]), tmp_path / "out")
    found, base = tensors_of(tmp_path / "out"), tensors_of(published)
    name = "model.layers.1.self_attn.q_proj"
    first = load_file(folder / "adapter_model.safetensors")
    a, b = (first[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    second = open_run_adapters(other).source
    whole = base[f"model/{name}.weight"].float()
    whole += (b @ a) * (0.5 * 6.0 / 3**0.5)
    whole += (second.read_b(name, 0, 128) @ second.read_a(name)) * (-2 * 2.0 / 2**0.5)
    assert torch.equal(found[f"model/{name}.weight"], whole.bfloat16())
    table = "model/model.embed_tokens.weight"
    deltas = load_file(folder / "query_tokens.safetensors")["query_deltas.weight"]
    assert torch.equal(found[table][-15:], (base[table][-15:].float() + 0.5 * deltas).bfloat16())
    projector = load_file(folder / "projector.safetensors")["fc1.weight"]
    half = base["projector/fc1.weight"] + 0.5 * (projector - base["projector/fc1.weight"])
    assert torch.equal(found["projector/fc1.weight"], half)


def test_a_weight_of_zero_changes_nothing(published, folder, tmp_path):
    merge_folder(published, parse_adapters([f"{folder}=0"]), tmp_path / "out")
    assert same_bytes(tensors_of(tmp_path / "out"), tensors_of(published)) == []


def test_a_tied_table_stays_tied(tmp_path):
    """Its copy in the file, which some folders have, changes with it."""
    tied = write_published(tmp_path / "tied", is_tied=True)
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    import_release(open_source(tied, None), tmp_path / "imported")
    run = write_adapted_run(tmp_path / "imported", tmp_path / "run", ALL)
    merge_folder(tied, parse_adapters([str(run)]), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])
    open_source(tmp_path / "out", None)


def test_a_distilled_run_has_the_query_tokens_that_it_began_with(imported, published, tmp_path):
    """Their rows follow those of the base, in both tables, with the changes of all query tokens in the embedding."""
    section = dataclasses.replace(LORA, targets=("q_proj",), train_queries=True)
    run = write_adapted_run(imported, tmp_path / "run", section, block_side=8)
    adapters = open_run_adapters(run)
    with pytest.raises(CheckpointError, match="added 48 query tokens, which its base .*published. lacks.*--merge"):
        export_adapter(adapters, tmp_path / "adapters")
    found, base = tensors_of(export_merged(run, tmp_path / "out")), tensors_of(published)
    deltas = adapters.source.read_queries()
    new = NewQueries(len(base["model/lm_head.weight"]), 15, 48, "mean", seed=5, init_std=0.02)
    for table, ours in (("model.embed_tokens", EMBEDDING), ("lm_head", OUTPUT)):
        old = base[f"model/{table}.weight"]
        rows = torch.cat([old, new.rows(ours, old[-15:]).bfloat16()])
        if ours == EMBEDDING:
            rows[-63:] = (rows[-63:].float() + deltas).bfloat16()
        assert torch.equal(found[f"model/{table}.weight"], rows), table
    import_release(open_source(tmp_path / "out", None), tmp_path / "again")


def test_other_weights_are_refused(published, folder, tmp_path):
    """A row of one linear of the base is another; a whole base is; adapters of another p and of another size."""
    other = shutil.copytree(published, tmp_path / "other")
    head = load_file(other / "vision_head.safetensors")
    head["net.res_blocks.1.w2.weight"][3, 5] += 0.25
    save_file(head, other / "vision_head.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of 43 linears differ, such as head.net.res_blocks.1.w2. Their base"):
        merge_folder(other, parse_adapters([str(folder)]), tmp_path / "out")
    larger = write_published(tmp_path / "larger", block_side=2)
    with pytest.raises(CheckpointError, match="vision.block_side is 4 of their base, 2 of"):
        merge_folder(larger, parse_adapters([str(folder)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_or_another_is_refused(imported, published, tmp_path):
    moved = shutil.copytree(imported, tmp_path / "moved")
    run = write_adapted_run(moved, tmp_path / "run")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="moved: no checkpoint is there.*name them with --base"):
        open_run_adapters(run)
    assert open_run_adapters(run, base=tmp_path / "elsewhere").base.path.is_relative_to(tmp_path / "elsewhere")
    import_release(open_source(published, None), tmp_path / "again")
    with pytest.raises(CheckpointError, match="its adapters were trained beside other weights"):
        open_run_adapters(run, base=tmp_path / "again")
