"""`bitdance export` of runs with adapters, and `bitdance sample` with them, as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.run_adapters import open_run_adapters
from bitdance_scale.cli.main import main
from bitdance_scale.generate.caption_pipeline import CaptionPipeline
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.model.low_rank import merged
from tests.adapted import LORA, write_adapted_run
from tests.released import class_file_content, write_published

FAST = ["--steps", "2", "--guidance", "2", "--size", "32x32", "--device", "cpu"]
ALL = dataclasses.replace(LORA, train_projector=True, train_queries=True)


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`published`, its import, a run with adapters, its adapters, and the two as one."""
    root = tmp_path_factory.mktemp("export")
    import_release(open_source(write_published(root / "published"), None), root / "imported")
    write_adapted_run(root / "imported", root / "run", ALL)
    assert run("export", root / "run", root / "style") == 0
    assert run("export", root / "run", root / "merged", "--merge") == 0
    return root


def test_a_run_with_adapters_is_exported_as_them_or_merged(root, capsys):
    assert (root / "style" / "bitdance_adapter.json").is_file()
    assert not (root / "style" / "model.safetensors").exists()
    assert (root / "merged" / "model.safetensors").is_file()
    report = json.loads((root / "merged" / "conversion_report.json").read_text())
    assert [entry["weight"] for entry in report["adapters"]] == [1.0]
    assert run("export", root / "run", root / "again", "--backbone-dtype", "bfloat16") == 0
    assert re.search("again: adapters of 35 linears, rank 3, trained weights, step 3 of", capsys.readouterr().out)


def test_drawn_with_adapters_as_with_the_merged_folder(root, tmp_path, capsys):
    """Bit for bit; and otherwise than without."""
    prompt = ["--prompt", "a red circle", "--seed", 3]
    for name, arguments in {
        "merged": [root / "merged"],
        "with": [root / "published", "--adapter", root / "style"],
        "run": [root / "published", "--adapter", f"{root / 'run'}=1"],
        "half": [root / "published", "--adapter", f"{root / 'style'}=0.5"],
        "without": [root / "published"],
    }.items():
        assert run("sample", *arguments, *prompt, "--out", tmp_path / name, *FAST) == 0, capsys.readouterr().err
    pictures = {
        name: (tmp_path / name / "00000.png").read_bytes() for name in ("merged", "with", "run", "half", "without")
    }
    assert pictures["with"] == pictures["merged"] == pictures["run"]
    assert len({*pictures.values()}) == 3
    line = json.loads((tmp_path / "half" / "requests.jsonl").read_text())
    assert line["adapters"] == [f"{root / 'style'}=0.5"]


def test_a_benchmark_is_drawn_with_adapters_as_with_the_merged_folder(root, tmp_path):
    """They are part of what tells a drawing from others."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"first": "a red circle"}))
    fast = ["--prompts", prompts, "--steps", 1, "--guidance", 1, "--size", "32x32", "--dtype", "float32", "--nproc", 1]
    for name, model in {
        "with": [root / "published", "--adapter", root / "style"],
        "merged": [root / "merged"],
        "half": [root / "published", "--adapter", f"{root / 'style'}=0.5"],
    }.items():
        assert run("evaluate", "draw", "dpg", *model, "--name", "m", "--out", tmp_path / name, *fast) == 0
    pictures = {name: (tmp_path / name / "first.png").read_bytes() for name in ("with", "merged", "half")}
    assert pictures["with"] == pictures["merged"] != pictures["half"]
    records = [json.loads((tmp_path / name / "drawing.json").read_text()) for name in ("with", "half")]
    assert records[0]["settings"]["adapters"] == [str(root / "style")]
    assert records[0]["model"]["sha256"] != records[1]["model"]["sha256"]


def test_described_with_adapters_as_with_the_merged_folder(root):
    cpu = torch.device("cpu")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    merged_model = CaptionPipeline.from_pretrained(root / "merged", torch.float32, cpu)
    model = CaptionPipeline.from_pretrained(
        root / "published", torch.float32, cpu, adapters=parse_adapters([str(root / "style")])
    )
    assert torch.equal(model.model.output, merged_model.model.output)
    for (name, one), other in zip(
        model.model.backbone.named_parameters(), merged_model.model.backbone.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert model([image], max_tokens=4) == merged_model([image], max_tokens=4)


def test_bits_of_the_pipeline(root):
    """The seam of other programs: adapters by name, to a pipeline."""
    adapters = parse_adapters([str(root / "style")])
    pipeline = BitDancePipeline.from_pretrained(root / "published", device="cpu", adapters=adapters)
    merged_pipeline = BitDancePipeline.from_pretrained(root / "merged", device="cpu")
    bits = [
        each("a", 32, 32, 2, generator=torch.Generator().manual_seed(1), output_type="bits").images
        for each in (pipeline, merged_pipeline)
    ]
    assert np.array_equal(*bits)


def test_a_published_folder_takes_adapters(root, tmp_path, capsys):
    named = ("--merge", "--adapter", root / "style", "--license", "apache-2.0", "--model-name", "Mine")
    assert run("export", root / "published", tmp_path / "out", *named) == 0
    assert "README.md: a generated card, licence apache-2.0" in capsys.readouterr().out
    assert "# Mine\n" in (tmp_path / "out" / "README.md").read_text()
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", root / "merged"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_class_conditional_run_is_merged(tmp_path, capsys):
    """One published linear has queries, keys and values; the tables of classes and queries are apart."""
    content = class_file_content()
    torch.save({"model": content}, tmp_path / "a.pt")
    import_release(open_class_source(PickledFile(tmp_path / "a.pt")), tmp_path / "imported")
    section = dataclasses.replace(ALL, targets=("attention.*", "feed_forward.w1", "head.*"))
    folder = write_adapted_run(tmp_path / "imported", tmp_path / "run", section)
    assert run("export", folder, tmp_path / "adapters") == 2
    assert "adapters of a class-conditional network" in capsys.readouterr().err
    assert run("export", folder, tmp_path / "merged", "--merge") == 0, capsys.readouterr().err
    found, source = load_file(tmp_path / "merged" / "model.safetensors"), open_run_adapters(folder).source
    for linear, matrices in source.matrices.items():
        name = f"{linear.removeprefix('head.') if linear.startswith('head.head.') else linear}.weight"
        a, b = source.read_a(linear), source.read_b(linear, 0, matrices.out_size)
        assert torch.equal(found.pop(name), merged(content[name], a, b, matrices.scale)), name
    assert torch.equal(found.pop("query_token"), content["query_token"] + source.read_queries())
    for name in source.projector:
        assert torch.equal(found.pop(name), source.read_projector(name))
    assert "cls_embedding.weight" in found
    assert all(torch.equal(tensor, content[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/imported", "{out}", "--merge"], "--merge: .*imported.* has no adapters, and no --adapter names any"),
        (["{root}/published", "{out}", "--merge"], "is a published folder; name adapters with --adapter"),
        (["{root}/run", "{out}", "--adapter", "{root}/style"], "is written into the weights alone, with --merge"),
        (["{root}/imported", "{out}", "--base", "{root}/imported"], "--base .*: .* has no adapters; leave it out"),
        (
            ["{root}/published", "{out}", "--merge", "--adapter", "{root}/style", "--head-dtype", "float16"],
            "--head-dtype: .*published is a published folder, which keeps what it has",
        ),
        (["{root}/run", "{out}", "--weights", "averaged"], "has no averaged weights to export"),
    ],
)
def test_what_cannot_be_exported_is_refused(root, tmp_path, capsys, arguments, message):
    assert run("export", *(text.format(root=root, out=tmp_path / "out") for text in arguments)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_draw_nothing(root, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in (root / "style").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "head_adapter.safetensors")
    tensors["net.res_blocks.7.w1.lora_A.weight"] = tensors.pop("net.res_blocks.1.w1.lora_A.weight")
    save_file(tensors, other / "head_adapter.safetensors")
    arguments = ["sample", root / "published", "--prompt", "a", "--out", tmp_path / "out", "--adapter", other, *FAST]
    assert run(*arguments) == 2
    assert "head.net.res_blocks.1.w1 has net.res_blocks.1.w1.lora_B.weight alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
