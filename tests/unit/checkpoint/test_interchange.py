"""Import and export of released weights: what is made, what is refused, and that nothing half made is left."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import convert_to_hf
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale import atomic_files
from bitdance_scale.checkpoint import conversion_folder
from bitdance_scale.checkpoint import export_text as export_module
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.integrity import write_manifest
from bitdance_scale.checkpoint.published_files import TensorFileWriter
from bitdance_scale.checkpoint.release_source import NewParts, open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.errors import BitDanceError, CheckpointError, ConfigError
from bitdance_scale.model.published_names import Part
from bitdance_scale.sequence.tokens import load_text_tokenizer
from bitdance_scale.train.process import EXIT_REFUSED
from tests.released import (
    HEAD,
    as_a_run,
    edit_config,
    qwen_like,
    read_json,
    write_autoencoder,
    write_plain_qwen3,
)

NUM_ENTRIES = len(qwen_like())


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture
def copy(published, tmp_path) -> Path:
    """A published folder to damage."""
    return shutil.copytree(published, tmp_path / "copy")


def new_parts(autoencoder: Path, **options) -> NewParts:
    return NewParts(autoencoder=autoencoder, head_width=HEAD.width, head_blocks=2, head_adaln=1, **options)


def stored(run: Path) -> StoredTensors:
    return StoredTensors(find_checkpoint(run) / "tensors")


def whole(run: Path, name: str) -> torch.Tensor:
    tensors = stored(run)
    num_rows = tensors.index.spec(f"model.{name}").shape[0]
    return tensors.read_rows(f"model.{name}", 0, num_rows)


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class TestRoundTrip:
    def test_files_say_what_the_published_ones_say(self, published, imported, tmp_path):
        export_release(open_checkpoint(imported), tmp_path / "out")
        for name in ("config.json", "vision_head_config.json", "ae_config.json"):
            wanted, found = read_json(published / name), read_json(tmp_path / "out" / name)
            missing = {key: value for key, value in wanted.items() if found.get(key) != value}
            # Of the model it does not say which library saved it, and its windows are never used.
            assert {*missing} <= {"transformers_version", "max_window_layers"}, missing
        tokenizers = [
            load_text_tokenizer(open_checkpoint(imported, tokenizer=folder).network.text, 16)
            for folder in (published, tmp_path / "out")
        ]
        assert tokenizers[0].digest == tokenizers[1].digest

    def test_report_names_step_configuration_and_every_tensor(self, imported, tmp_path):
        export_release(open_checkpoint(imported), tmp_path / "out")
        report = read_json(tmp_path / "out" / "conversion_report.json")
        train_state = read_json(find_checkpoint(imported) / "train_state.json")
        assert (report["step"], report["config_sha256"]) == (0, train_state["config_sha256"])
        for part, file in (("backbone", "model"), ("head", "vision_head"), ("projector", "projector")):
            assert {*report["tensor_sha256"][part]} == {*load_file(tmp_path / "out" / f"{file}.safetensors")}
        assert report["runs_in_published_pipeline"]
        # The import saw the same tensors in the folder it read.
        digests = read_json(imported / "conversion_report.json")["tensor_sha256"]
        assert digests == {k: v for part in report["tensor_sha256"].values() for k, v in part.items()}

    def test_large_backbones_are_split_into_files_with_an_index(self, published, imported, tmp_path, monkeypatch):
        monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 100_000)
        export_release(open_checkpoint(imported), tmp_path / "out")
        index = read_json(tmp_path / "out" / "model.safetensors.index.json")
        sizes = collections.Counter()
        found = {}
        for name, file in index["weight_map"].items():
            found[name] = load_file(tmp_path / "out" / file)[name]
            sizes[file] += found[name].nbytes
        assert len(sizes) > 3 and max(sizes.values()) <= 100_000
        assert index["metadata"]["total_size"] == sum(sizes.values())
        wanted = load_file(published / "model.safetensors")
        assert {*wanted} == {*found} and all(torch.equal(wanted[name], found[name]) for name in wanted)
        # And such a folder is read again.
        import_release(open_source(tmp_path / "out", None), tmp_path / "again")
        assert torch.equal(whole(tmp_path / "again", "embedding.weight"), wanted["model.embed_tokens.weight"])

    def test_dtypes_can_be_chosen(self, imported, tmp_path):
        export_release(open_checkpoint(imported, dtypes={Part.HEAD: "bfloat16"}), tmp_path / "out")
        found = load_file(tmp_path / "out" / "vision_head.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        name = "net.cond_embed.weight"
        assert torch.equal(found[name], whole(imported, f"head.{name}").bfloat16())


class TestUnfinishedRun:
    def test_it_is_said_and_kept_in_the_report(self, imported, tmp_path, capsys):
        run = as_a_run(imported, tmp_path / "run", steps=20)
        assert convert_to_hf.main([str(run), str(tmp_path / "out")]) == 0
        warning = "step 0 of 20 of run sft_small, stage sft: the run has not finished"
        assert f"warning: {find_checkpoint(run)} is at {warning}\n" in capsys.readouterr().err
        assert read_json(tmp_path / "out" / "conversion_report.json")["run"] == {
            "name": "sft_small",
            "stage": "sft",
            "step": 0,
            "num_steps": 20,
            "is_finished": False,
        }

    def test_a_finished_run_and_an_import_are_not_warned_of(self, imported, tmp_path, capsys):
        finished = open_checkpoint(as_a_run(imported, tmp_path / "run", steps=0))
        assert finished.run is not None and finished.run.is_finished and finished.warning is None
        assert convert_to_hf.main([str(imported), str(tmp_path / "out")]) == 0
        assert "warning" not in capsys.readouterr().err
        assert read_json(tmp_path / "out" / "conversion_report.json")["run"] is None


class TestAveragedWeights:
    def test_an_import_has_none_to_export(self, imported, tmp_path, capsys):
        assert convert_to_hf.main([str(imported), str(tmp_path / "out"), "--weights", "averaged"]) == EXIT_REFUSED
        message = capsys.readouterr().err
        assert f"{find_checkpoint(imported)} has no averaged weights to export" in message
        assert "--weights trained" in message and not (tmp_path / "out").exists()

    def test_without_averages_the_trained_ones_are_written_and_named(self, imported, tmp_path, capsys):
        assert convert_to_hf.main([str(imported), str(tmp_path / "out")]) == 0
        assert "trained weights, step 0 of" in (said := capsys.readouterr().out) and "others" not in said
        assert read_json(tmp_path / "out" / "conversion_report.json")["weights"] == "trained"


def drop_tensor(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def add_tensor(folder: Path) -> None:
    edit_tensors(folder / "projector.safetensors", lambda tensors: tensors.update(fc3=torch.ones(2)))


def reshape_tensor(folder: Path) -> None:
    edit_tensors(
        folder / "vision_head.safetensors",
        lambda tensors: tensors.update({"net.input_proj.weight": tensors["net.input_proj.weight"][:, :8].contiguous()}),
    )


def retype_tensor(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}),
    )


def integer_tensor(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}),
    )


def cut_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def index_out_of_folder(folder: Path) -> None:
    content = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def more_queries(folder: Path) -> None:
    edit_config(folder, "vision_head_config.json", parallel_num=64)


def fewer_queries(folder: Path) -> None:
    edit_config(folder, "vision_head_config.json", parallel_num=4)


FAULTS = {
    "missing tensor": (drop_tensor, ["model.layers.2.mlp.up_proj.weight is missing", "model.safetensors", "[96, 64]"]),
    "extra tensor": (add_tensor, ["fc3", "projector.safetensors", "no tensor of this network"]),
    "wrong shape": (reshape_tensor, ["net.input_proj.weight", "[128, 8]", "expected [128, 16]"]),
    "mixed dtypes": (retype_tensor, ["model.norm.weight", "torch.float32", "expected torch.bfloat16"]),
    "no weights' dtype": (integer_tensor, ["model.norm.weight is I8"]),
    "cut file": (cut_file, ["model.safetensors", "not a readable safetensors file", "fetch"]),
    "missing file": (lambda folder: (folder / "projector.safetensors").unlink(), ["projector.safetensors"]),
    "index out of the folder": (index_out_of_folder, ["../model.safetensors", "no name of a file"]),
    "too few query tokens": (more_queries, ["15 query tokens", "need 63"]),
    "too many query tokens": (fewer_queries, ["15 query tokens", "need 3"]),
    "another architecture": (
        lambda folder: edit_config(folder, architectures=["LlamaForCausalLM"]),
        ["LlamaForCausalLM", "Qwen3ForCausalLM"],
    ),
    "other rows than entries": (
        lambda folder: edit_config(folder, vocab_size=600),
        ["vocab_size = 600", f"has {NUM_ENTRIES + 256 + 15} entries"],
    ),
    "two rotary bases": (lambda folder: edit_config(folder, rope_theta=5e5), ["rope_theta = 500000.0", "disagree"]),
    "scaled positions": (
        lambda folder: edit_config(folder, rope_scaling={"rope_type": "yarn"}),
        ["rope_scaling.rope_type = 'yarn'", "remove rope_type"],
    ),
    "head of another backbone": (
        lambda folder: edit_config(folder, "vision_head_config.json", ch_cond=128),
        ["ch_cond = 128", "must be 64"],
    ),
    "unknown head setting": (
        lambda folder: edit_config(folder, "vision_head_config.json", depth_extra=1),
        ["vision_head_config.json", "depth_extra: unknown"],
    ),
    "no autoencoder": (lambda folder: (folder / "ae.safetensors").unlink(), ["ae.safetensors", "no such file"]),
    "autoencoder of other sizes": (
        lambda folder: edit_tensors(folder / "ae.safetensors", lambda tensors: tensors.pop("decoder.conv_out.bias")),
        ["ae.safetensors", "decoder.conv_out.bias is missing"],
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_folder_that_does_not_fit_together(self, copy, tmp_path, fault):
        damage, expected = FAULTS[fault]
        damage(copy)
        with pytest.raises(BitDanceError) as caught:
            import_release(open_source(copy, None), tmp_path / "out")
        for text in expected:
            assert text in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} == {"copy"}

    def test_a_qwen3_that_lacks_entries_or_has_too_many(self, tmp_path, autoencoder):
        source = write_plain_qwen3(tmp_path / "qwen3", spare_rows=-3)
        with pytest.raises(CheckpointError, match=rf"vocab_size = {NUM_ENTRIES - 3} .* {NUM_ENTRIES} entries"):
            open_source(source, new_parts(autoencoder))

    def test_a_release_without_its_head(self, copy, autoencoder):
        (copy / "vision_head_config.json").unlink()
        with pytest.raises(CheckpointError, match="resolution or query tokens already"):
            open_source(copy, new_parts(autoencoder))

    @pytest.mark.parametrize(
        ("option", "message"), [({"block_side": 0}, "--block-side 0"), ({"seed": -1}, "--seed -1")]
    )
    def test_options_that_are_no_sizes(self, tmp_path, autoencoder, option, message):
        with pytest.raises(BitDanceError, match=f"{message}: must be"):
            open_source(write_plain_qwen3(tmp_path / "qwen3"), new_parts(autoencoder, **option))

    def test_options_that_do_not_belong_to_the_folder(self, published, tmp_path, autoencoder):
        with pytest.raises(CheckpointError, match="leave out --autoencoder"):
            open_source(published, new_parts(autoencoder))
        with pytest.raises(CheckpointError, match="also needs --autoencoder"):
            open_source(write_plain_qwen3(tmp_path / "qwen3"), None)

    def test_a_checkpoint_of_another_tokenizer(self, imported, tmp_path):
        tokenizer, other = qwen_like(), tmp_path / "other"
        tokenizer.add_tokens(["<other>"])
        tokenizer.save_pretrained(other)
        with pytest.raises(CheckpointError, match="another text tokenizer than is in .*other; name its own"):
            open_checkpoint(imported, tokenizer=other)

    @pytest.mark.parametrize(
        ("setting", "value", "usual"),
        [
            ("model.mask", "causal", "block"),
            ("vision.order", "raster", "block"),
            ("head.kind", "bitwise", "diffusion"),
            ("vision.latents", "continuous", "bits"),
        ],
    )
    def test_a_checkpoint_of_an_ablation(self, imported, tmp_path, setting, value, usual):
        run = shutil.copytree(imported, tmp_path / "run")
        folder = find_checkpoint(run)
        config = folder / "config.toml"
        key = setting.partition(".")[2]
        # A head of this kind has the key `kind`, and so has the tokenizer.
        before, section, after = config.read_text().partition(f"[{setting.partition('.')[0]}]")
        assert f'{key} = "{usual}"' in after
        config.write_text(before + section + after.replace(f'{key} = "{usual}"', f'{key} = "{value}"', 1))
        (folder / "manifest.json").unlink()
        write_manifest(folder)
        with pytest.raises(
            ConfigError, match=f"{setting} = '{value}': .* only models of {setting} = '{usual}' can be exported"
        ):
            open_checkpoint(run)

    def test_a_checkpoint_that_is_damaged(self, imported, tmp_path):
        run = shutil.copytree(imported, tmp_path / "run")
        file = next((find_checkpoint(run) / "tensors").glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            export_release(open_checkpoint(run), tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"run"}

    def test_no_checkpoint(self, published, tmp_path):
        with pytest.raises(CheckpointError, match="import it first with `bitdance import "):
            open_checkpoint(published)
        with pytest.raises(CheckpointError, match="no checkpoint is there; name a run folder"):
            open_checkpoint(tmp_path)


class TestOutcome:
    def test_an_existing_folder_needs_force_and_a_report(self, published, imported, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine").write_text("kept")
        export = open_checkpoint(imported)
        with pytest.raises(CheckpointError, match="exists already; .* --force"):
            export_release(export, out)
        with pytest.raises(CheckpointError, match="no conversion_report.json, so --force does not replace it"):
            export_release(export, out, is_forced=True)
        assert (out / "mine").read_text() == "kept"
        shutil.rmtree(out)
        export_release(export, out)
        (out / "mine").write_text("of the first")
        export_release(export, out, is_forced=True)
        assert not (out / "mine").exists() and (out / "config.json").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    def test_a_full_disk_is_noticed_before(self, published, imported, tmp_path, monkeypatch):
        monkeypatch.setattr(
            conversion_folder.shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(1000)
        )
        for convert in (
            lambda: export_release(open_checkpoint(imported), tmp_path / "out"),
            lambda: import_release(open_source(published, None), tmp_path / "out"),
        ):
            with pytest.raises(CheckpointError, match=r"\d MB will be written and 1.00 kB are free"):
                convert()
        assert not [*tmp_path.iterdir()]

    def test_a_disk_that_fills_up_leaves_what_was_there(self, imported, tmp_path, monkeypatch):
        out = tmp_path / "out"
        export_release(open_checkpoint(imported), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}

        def full(writer, name, values):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(TensorFileWriter, "write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            export_release(open_checkpoint(imported), out, is_forced=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    @pytest.mark.parametrize("is_killed", [False, True])
    def test_a_replacement_that_fails_half_way_gives_the_earlier_folder_back(
        self, imported, tmp_path, monkeypatch, is_killed
    ):
        """Between the two renames the earlier folder has another name, and is the only finished one."""
        out = tmp_path / "out"
        export_release(open_checkpoint(imported), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        if is_killed:
            os.rename(out, tmp_path / "out.replaced")
        else:
            rename = os.rename

            def fail(source, target):
                if Path(source).name == "out.writing":
                    raise OSError(5, "Input/output error")
                rename(source, target)

            monkeypatch.setattr(atomic_files.os, "rename", fail)
            with pytest.raises(CheckpointError, match="Input/output error"):
                export_release(open_checkpoint(imported), out, is_forced=True)
            monkeypatch.undo()
        with pytest.raises(CheckpointError, match="exists already"):
            export_release(open_checkpoint(imported), out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    def test_what_is_written_wrongly_is_noticed(self, published, imported, tmp_path, monkeypatch):
        write = TensorFileWriter.write

        def corrupt(writer, name, values):
            write(writer, name, values)
            if name == "model.norm.weight":
                writer._file.seek(-1, os.SEEK_CUR)
                writer._file.write(b"\xff")

        monkeypatch.setattr(TensorFileWriter, "write", corrupt)
        with pytest.raises(CheckpointError, match="model.norm.weight reads back with other values"):
            export_release(open_checkpoint(imported), tmp_path / "out")
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("direction", ["import", "export"])
    def test_a_killed_conversion_leaves_no_finished_folder(self, published, imported, tmp_path, direction):
        source, out = (published, tmp_path / "out") if direction == "import" else (imported, tmp_path / "out")
        process = multiprocessing.get_context("spawn").Process(target=_convert_and_die, args=(direction, source, out))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == 9
        assert {path.name for path in tmp_path.iterdir()} == {"out.writing"}
        assert not (tmp_path / "out.writing" / "conversion_report.json").exists()
        _convert(direction, source, out)
        assert {path.name for path in tmp_path.iterdir()} == {"out"}


def _convert(direction: str, source: Path, out: Path, on_bytes=lambda _: None) -> None:
    if direction == "import":
        import_release(open_source(source, None), out, on_bytes=on_bytes)
    else:
        export_release(open_checkpoint(source), out, on_bytes=on_bytes)


def _convert_and_die(direction: str, source: Path, out: Path) -> None:
    calls = []

    def on_bytes(num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == 40:
            os._exit(9)

    _convert(direction, source, out, on_bytes)
