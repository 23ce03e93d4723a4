"""`bitdance sample` with runs, checkpoints and imports: the pictures of benchmarks, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.stored_config import stored_config
from bitdance_scale.cli.sample import main
from bitdance_scale.config.data_schema import DataFilter
from bitdance_scale.config.schema import ParallelSection, RunConfig
from bitdance_scale.evaluation.benchmarks.solving import Solving, drawing_config
from bitdance_scale.train.prompt_models import RunPrompts
from bitdance_scale.train.run import joined_ranks
from tests.adapted import write_adapted_run
from tests.released import class_file_content, write_published

FAST = ["--steps", "2", "--guidance", "2", "--size", "32x48"]


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "imported"
    import_release(open_source(write_published(folder.parent / "published"), None), folder)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import that draws three classes."""
    folder = tmp_path_factory.mktemp("classes")
    torch.save({"model": class_file_content()}, folder / "small.pt")
    import_release(open_class_source(PickledFile(folder / "small.pt")), folder / "imported")
    return folder / "imported"


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]


def drawn(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(out / line["file"])) for line in records(out)]


def of_benchmarks(config: RunConfig, checkpoint: Path, prompts: list[str], seeds: list[int]) -> list[np.ndarray]:
    """What `bitdance evaluate draw` draws, 32 x 48 px with 2 steps and guidance 2."""
    config = dataclasses.replace(config, parallel=ParallelSection())
    config = drawing_config(config, Solving((32, 48), 2, 2.0, "euler_maruyama"), "trained")
    with joined_ranks(config.parallel) as topology:
        images = RunPrompts(config, checkpoint, topology).draw(prompts, seeds)
    assert images is not None
    return images


def test_an_import_draws_as_benchmarks_do(imported, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "a blue one", "height": 32, "width": 32},
        {"prompt": "b", "seed": 9},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    out, checkpoint = tmp_path / "out", find_checkpoint(imported)
    assert run(imported, "--config", "demo", "--prompts", prompts, "--seed", 4, "--out", out, *FAST) == 0
    found = sorted(records(out), key=lambda line: line["number"])
    assert [line["seed"] for line in found] == [4, 5, 9]
    where = {"checkpoint": str(checkpoint), "weights": "trained", "guidance_growth": "constant", "config": "demo"}
    assert all(line.items() >= where.items() and "folder" not in line for line in found)
    wide = of_benchmarks(stored_config(checkpoint, [], "demo"), checkpoint, ["a red circle", "b"], [4, 9])
    for number, image in zip((0, 2), wide, strict=True):
        assert (np.asarray(Image.open(out / found[number]["file"])) == image).all()
    assert Image.open(out / found[1]["file"]).size == (32, 32)


def test_a_run_has_its_own_settings_and_prompts(imported, tmp_path, capsys, monkeypatch):
    # The open end of a range has no number in TOML.
    folder = write_adapted_run(imported, tmp_path / "style", filters=(DataFilter(column="aspect", max=2.0),))
    trainable = ["data.resolutions=[{side_px=16, share=1, buckets_px=[[16, 16]]}]", "data.max_pack_tokens=1024"]
    own = [*trainable, "sample.prompts=['a red circle','a blue one']", "sample.size_px=[32,48]", "sample.num_steps=2"]
    monkeypatch.chdir(tmp_path)
    assert run(folder, *own, "sample.guidance=2.0") == 0
    assert "wrote samples/style: 2 pictures" in capsys.readouterr().out
    found = records(Path("samples/style"))
    assert [(line["prompt"], line["seed"]) for line in found] == [("a red circle", 0), ("a blue one", 1)]
    checkpoint = find_checkpoint(folder)
    expected = {"height": 32, "width": 48, "steps": 2, "guidance": 2.0, "checkpoint": str(checkpoint)}
    assert found[0].items() >= expected.items() and found[0]["overrides"] == [*own, "sample.guidance=2.0"]
    images = of_benchmarks(stored_config(checkpoint, own), checkpoint, ["a red circle", "a blue one"], [0, 1])
    assert all((image == wanted).all() for image, wanted in zip(drawn(Path("samples/style")), images, strict=True))
    # An option comes before a setting, and a checkpoint is as good as its run.
    assert run(checkpoint, *own, "--prompt", "a red circle", "--guidance", 2, "--steps", 1, "--out", "other") == 0
    assert records(Path("other"))[0]["steps"] == 1
    assert run(folder, *own, "sample.weights=averaged", "optim.average_decay=0.9") == 2
    assert "has no averaged weights. Checkpoints of runs with optim.average_decay" in capsys.readouterr().err


def test_another_vision_tokenizer_is_refused(imported, tmp_path, capsys):
    weights, other = load_file(imported / "ae.safetensors"), tmp_path / "other.safetensors"
    save_file({name: -tensor if name.startswith("decoder") else tensor for name, tensor in weights.items()}, other)
    same = tmp_path / "same.safetensors"
    same.write_bytes((imported / "ae.safetensors").read_bytes())
    adapted = write_adapted_run(imported, tmp_path / "style")
    trainable = ["data.resolutions=[{side_px=16, share=1, buckets_px=[[16, 16]]}]", "data.max_pack_tokens=1024"]
    for model in ([imported, "--config", "demo"], [adapted, *trainable]):
        ask = [*model, "--prompt", "a", *FAST]
        assert run(*ask, f"vision.weights={other}", "--out", tmp_path / "none") == 2
        assert "trained with another vision tokenizer" in capsys.readouterr().err
        assert not list(tmp_path.glob("none/*.png"))
        assert run(*ask, f"vision.weights={same}", "--out", tmp_path / "out" / model[0].name) == 0


def test_frozen_weights_that_a_run_has_fetched_are_taken_without_s3(imported, tmp_path, capsys):
    folder, base = write_adapted_run(imported, tmp_path / "style"), find_checkpoint(imported)
    trainable = ["data.resolutions=[{side_px=16, share=1, buckets_px=[[16, 16]]}]", "data.max_pack_tokens=1024"]
    ask = [folder, *trainable, "--prompt", "a red circle", *FAST]
    assert run(*ask, "--out", tmp_path / "beside") == 0
    ask += ["run.start_from='s3://a-bucket/gone'", "checkpoint.upload_endpoint_url='http://localhost:9'"]
    fetched = folder / "start" / base.name
    # An unfinished one, and one that is damaged.
    shutil.copytree(base, fetched.with_name(base.name + ".writing"))
    damaged = shutil.copytree(base, fetched.with_name("step_00000007"))
    (damaged / "manifest.json").write_text("{}")
    shutil.copytree(base, fetched)
    assert run(*ask, "--out", tmp_path / "fetched") == 0
    (first,), (second,) = drawn(tmp_path / "beside"), drawn(tmp_path / "fetched")
    assert (first == second).all()


def test_classes_are_drawn_by_number(classes, tmp_path, capsys):
    size = "data.resolutions=[{side_px=8, share=1, buckets_px=[[8, 8]]}]"
    model = [classes, "--config", "class_demo", size, "--steps", 2, "--guidance", 2]
    assert run(*model, "--prompt", 0, "--prompt", 2, "--out", tmp_path / "out") == 0
    first, other = drawn(tmp_path / "out")
    assert first.shape == other.shape and (first != other).any()
    for arguments, message in (
        (["--prompt", "a cat"], "draws classes, not prompts in words; class 'a cat': must be the number of a class, 0"),
        (["--prompt", 0, "--size", "64x64"], "its images are .*; leave --size out"),
    ):
        assert run(*model, *arguments, "--out", tmp_path / "none") == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is an import, which has no settings of a run"),
        (["--config", "demo", "--adapter", "style"], "make it with `bitdance export "),
        (["--config", "demo", "--dtype", "float32"], "--dtype float32: .* write run.dtype=float32 instead"),
        (["--config", "demo", "--device", "cpu"], "--device cpu: .* leave it out"),
        (["--config", "demo", "parallel.tensor=2"], "parallel.tensor=2: one process draws, whatever trained; leave it"),
        (["--config", "demo", "--size", "33x32"], "height = 33, width = 32: both must be multiples"),
        (["--config", "demo", "--steps", "0"], "steps = 0"),
        (["--config", "demo", "sample.prompts=[]"], "has no prompts of its own; name some with --prompt"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(imported, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("bitdance_scale.train.drawer.load_still_run", None)
    assert run(imported, *arguments, "--out", tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
