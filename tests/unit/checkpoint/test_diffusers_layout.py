"""Folders in diffusers' layout: ours and those of others come back byte for byte; all else is refused."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitdance_scale
from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.cli.export_release import main
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_layout import DIFFUSERS
from bitdance_scale.sharing.diffusers_files import CODE_DIR
from bitdance_scale.train.process import EXIT_REFUSED
from tests.released import class_file_content, edit_config, read_json

COMPONENTS = ("autoencoder", "diffusion_head", "projector", "text_encoder", "tokenizer")
WEIGHTS = {
    "model.safetensors": "text_encoder/model.safetensors",
    "vision_head.safetensors": "diffusion_head/diffusion_pytorch_model.safetensors",
    "projector.safetensors": "projector/diffusion_pytorch_model.safetensors",
    "ae.safetensors": "autoencoder/diffusion_pytorch_model.safetensors",
}


def tensors_of(path: Path) -> dict[str, tuple]:
    return {
        name: (str(value.dtype), tuple(value.shape), value.view(torch.uint8).numpy().tobytes())
        for name, value in load_file(path).items()
    }


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "folder"
    export_release(open_checkpoint(imported, layout=DIFFUSERS), out)
    return out


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An export to change."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def community(published, tmp_path) -> Path:
    """The published folder as others convert it: diffusers' names, code of their own, other classes and versions."""
    folder = tmp_path / "community"
    for name in COMPONENTS:
        (folder / name).mkdir(parents=True)
    for source, target in WEIGHTS.items():
        shutil.copyfile(published / source, folder / target)
    shutil.copyfile(published / "config.json", folder / "text_encoder/config.json")
    (folder / "text_encoder/generation_config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(published / name, folder / "tokenizer" / name)
    own = {"_diffusers_version": "0.36.0", "_name_or_path": "elsewhere"}
    configs = {
        "diffusion_head": read_json(published / "vision_head_config.json") | {"_class_name": "BitDanceDiffusionHead"},
        "autoencoder": read_json(published / "ae_config.json") | {"_class_name": "BitDanceAutoencoder"},
        "projector": {"_class_name": "BitDanceProjector", "in_dim": 16, "out_dim": 64},
    }
    for name, content in configs.items():
        (folder / name / "config.json").write_text(json.dumps(own | content))
    index = {name: ["bitdance_diffusers.modeling", f"BitDance_{name}"] for name in COMPONENTS}
    index |= {"text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"]}
    index |= {"_class_name": "BitDanceDiffusionPipeline", "supported_image_sizes": [[512, 512]], **own}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "bitdance_diffusers").mkdir()
    (folder / "bitdance_diffusers/__init__.py").write_text("raise SystemExit('code of the folder was run')\n")
    for name in COMPONENTS:
        (folder / name / "modeling.py").write_text("raise SystemExit('code of the folder was run')\n")
    return folder


def reexported(folder: Path, out: Path) -> Path:
    """The release that an import of a folder is exported as."""
    import_release(open_source(folder, None), out / "imported")
    export_release(open_checkpoint(out / "imported"), out / "release")
    return out / "release"


class TestRoundTrip:
    def test_our_own_comes_back_byte_for_byte(self, published, exported, tmp_path):
        release = reexported(exported, tmp_path)
        for name, component in WEIGHTS.items():
            assert tensors_of(release / name) == tensors_of(published / name) == tensors_of(exported / component)

    def test_that_of_others_comes_back_byte_for_byte(self, published, community, tmp_path):
        release = reexported(community, tmp_path)
        for name in WEIGHTS:
            assert tensors_of(release / name) == tensors_of(published / name)
        for name in ("vision_head_config.json", "ae_config.json"):
            assert read_json(release / name) == read_json(published / name)

    def test_a_head_in_several_files_is_read(self, published, community, tmp_path):
        whole = community / WEIGHTS["vision_head.safetensors"]
        tensors = load_file(whole)
        names = [*tensors]
        parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, whole.with_name(file), metadata={"format": "pt"})
        weight_map = {name: file for file, part in parts.items() for name in part}
        whole.with_name(whole.name + ".index.json").write_text(json.dumps({"weight_map": weight_map}))
        whole.unlink()
        release = reexported(community, tmp_path)
        assert tensors_of(release / "vision_head.safetensors") == tensors_of(published / "vision_head.safetensors")

    def test_a_large_language_model_is_in_several_files(self, imported, tmp_path, monkeypatch):
        monkeypatch.setattr("bitdance_scale.checkpoint.export_text.MAX_FILE_BYTES", 100_000)
        export_release(open_checkpoint(imported, layout=DIFFUSERS), tmp_path / "out")
        index = read_json(tmp_path / "out/text_encoder/model.safetensors.index.json")
        assert {path.name for path in (tmp_path / "out/text_encoder").glob("*.safetensors")} == {
            *index["weight_map"].values()
        }
        assert len({*index["weight_map"].values()}) > 2

    def test_bitdance_draws_from_it(self, published, exported):
        settings = {"height": 16, "width": 32, "num_inference_steps": 1, "output_type": "bits"}
        bits = [
            BitDancePipeline.from_pretrained(folder, torch.float32, "cpu")(
                "a red circle", generator=torch.Generator().manual_seed(0), **settings
            ).images.tolist()
            for folder in (published, exported)
        ]
        assert bits[0] == bits[1]


class TestFolder:
    def test_the_index_names_what_is_there(self, exported):
        index = read_json(exported / "model_index.json")
        assert (exported / f"{index['_class_name'][0]}.py").is_file()
        for name in COMPONENTS:
            library, kind = index[name]
            code = exported / name / f"{library}.py"
            assert library == "transformers" or f"class {kind}(" in code.read_text(encoding="utf-8")
        assert {path.name for path in exported.iterdir()} == {
            *COMPONENTS,
            "model_index.json",
            "bitdance_pipeline.py",
            "README.md",
            "LICENSE",
            "conversion_report.json",
        }

    def test_its_configurations_have_the_published_keys(self, published, exported):
        for name, published_name in (("diffusion_head", "vision_head_config.json"), ("autoencoder", "ae_config.json")):
            content = read_json(exported / name / "config.json")
            own = {key: content.pop(key) for key in [*content] if key.startswith("_")}
            assert content == read_json(published / published_name)
            assert own.keys() == {"_class_name", "_diffusers_version"}

    def test_its_code_stands_alone(self):
        # diffusers fetches one file of code for each component.
        allowed = {"torch", "transformers", "tokenizers", "diffusers", "numpy", "safetensors", "PIL"}
        for path in CODE_DIR.glob("bitdance_*.py"):
            nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
            names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
            names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
            assert {name.split(".")[0] for name in names} <= allowed | sys.stdlib_module_names

    def test_nothing_in_the_package_runs_it(self):
        package = Path(bitdance_scale.__file__).parent
        for path in package.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            assert path.is_relative_to(CODE_DIR) or "sharing.diffusers_pipeline" not in source


class TestRefusals:
    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_source(folder, None)

    @pytest.mark.parametrize("value", [None, [None, None], "transformers"])
    def test_a_component_is_missing(self, copy, value):
        edit_config(copy, "model_index.json", projector=value)
        self.check(copy, "model_index.json: projector: no such component.*Fetch the whole folder")

    def test_a_folder_is_missing(self, copy):
        shutil.rmtree(copy / "tokenizer")
        self.check(copy, "model_index.json: tokenizer: no such component, or no folder for it")

    def test_another_language_model(self, copy):
        edit_config(copy, "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
        self.check(copy, "text_encoder is 'T5EncoderModel', expected a Qwen3ForCausalLM")

    def test_another_activation_of_the_projector(self, copy):
        edit_config(copy, "projector/config.json", hidden_act="relu")
        self.check(copy, "projector/config.json: hidden_act = 'relu', expected 'gelu_pytorch_tanh'")

    def test_a_projector_of_another_model(self, copy):
        edit_config(copy, "projector/config.json", in_dim=32)
        self.check(copy, "projector/config.json: in_dim = 32, expected 16.*take all components from one folder")

    def test_an_unknown_key_of_the_head(self, copy):
        edit_config(copy, "diffusion_head/config.json", num_experts=4)
        self.check(copy, "diffusion_head/config.json: num_experts: unknown to this program")

    def test_pickles_are_not_read(self, copy):
        path = copy / WEIGHTS["vision_head.safetensors"]
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
        self.check(copy, "only safetensors are read .not diffusion_pytorch_model.bin, which must be unpickled.")

    @pytest.mark.parametrize("name", ["projector/diffusion_pytorch_model.safetensors", "tokenizer"])
    def test_links_are_not_followed(self, copy, tmp_path, name):
        (copy / name).rename(tmp_path / "elsewhere")
        (copy / name).symlink_to(tmp_path / "elsewhere")
        self.check(copy, f"{name} is a symbolic link.*Fetch the folder again")

    def test_the_cache_of_hugging_face_is_followed(self, copy, tmp_path):
        blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/main"
        blobs.mkdir(parents=True)
        for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
            target = snapshot / path.relative_to(copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(blobs / str(number))
            target.symlink_to(blobs / str(number))
        source = open_source(snapshot, None)
        assert source.kind == "BitDance" and source.inert["base"]["hub_id"] == "a/b"

    def test_a_class_conditional_network(self, tmp_path):
        torch.save({"model": class_file_content()}, tmp_path / "file.pt")
        import_release(open_class_source(PickledFile(tmp_path / "file.pt")), tmp_path / "imported")
        with pytest.raises(ConfigError, match="--layout diffusers: .* class-conditional network.*leave --layout out"):
            open_checkpoint(tmp_path / "imported", layout=DIFFUSERS)

    def test_a_run_that_starts_from_it_says_to_import_it(self, copy, tmp_path, capsys):
        assert main([str(copy), str(tmp_path / "out")]) == EXIT_REFUSED
        assert "it is a Hugging Face folder: import it first" in capsys.readouterr().err
