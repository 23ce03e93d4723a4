"""`bitdance evaluate draw`: which settings draw, what is refused before any work, and what the ranks are told."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.checkpoint import stored_config
from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.integrity import MANIFEST_NAME
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.run_checkpoint import AVERAGE_PREFIX, MODEL_PREFIX
from bitdance_scale.checkpoint.tensor_index import TensorIndex
from bitdance_scale.cli import evaluate_draw
from bitdance_scale.cli.evaluate_draw import main
from bitdance_scale.cli.launch import Ranks
from bitdance_scale.config.load import dump_toml, load_config, load_network
from bitdance_scale.config.published_class import published_recipe
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.benchmarks.solving import Solving
from bitdance_scale.train.prompt_models import PublishedPrompts
from tests.released import class_file_content, write_published
from tests.unit.evaluation.benchmarks.small_benchmarks import published, write_lines

Seen = tuple[str, Benchmark, Sequence[Prompt], Solving, str]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run with a checkpoint that has no weights, of a shipped configuration; returns the checkpoint."""

    def make(config: str, *overrides: str) -> Path:
        checkpoint = tmp_path / "runs" / config / "checkpoints/step_00000010"
        checkpoint.mkdir(parents=True)
        (checkpoint / MANIFEST_NAME).write_text("{}")
        (checkpoint / "config.toml").write_text(dump_toml(load_config(config, overrides)))
        return checkpoint

    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What would be drawn."""
    found: list[Seen] = []

    def draw(options, benchmark, prompts, solving, config) -> int:
        found.append((options.name, benchmark, prompts, solving, options.weights))
        assert config is None or config.sample.guidance == solving.guidance
        return 0

    monkeypatch.setattr(evaluate_draw, "_draw", draw)
    return found


def drawn(seen: list[Seen], *arguments: object) -> Seen:
    assert main([*map(str, arguments), "--out=drawn", "--nproc=1"]) == 0
    return seen.pop()


def test_classes_are_drawn_as_their_model_says(make_run: MakeRun, seen: list[Seen]) -> None:
    name, benchmark, prompts, solving, weights = drawn(seen, "imagenet", make_run("imagenet_h_1x"))
    assert (name, benchmark.num_images, len(prompts), weights) == ("step_00000010", 50, 1000, "averaged")
    assert solving == Solving((256, 256), 100, 4.55, "euler_maruyama", "linear")
    _, _, prompts, solving, _ = drawn(seen, "imagenet", make_run("class_demo"))
    assert (len(prompts), prompts[3].text, prompts[3].category) == (24, "3", "3")
    assert solving == Solving((32, 32), 20, 2.0, "euler_maruyama", "linear")


def test_options_come_first(make_run: MakeRun, seen: list[Seen]) -> None:
    options = ["--steps=5", "--guidance=1.5", "--guidance-growth=constant", "--sampler=euler", "--weights=trained"]
    _, benchmark, prompts, solving, weights = drawn(
        seen, "imagenet", make_run("class_demo"), *options, "--images-per-prompt=2", "--name=ours"
    )
    assert solving == Solving((32, 32), 5, 1.5, "euler", "constant") and weights == "trained"
    assert benchmark.num_images == prompts[0].num_images == 2


def test_texts_are_drawn_as_published(make_run: MakeRun, seen: list[Seen], tmp_path: Path) -> None:
    run = make_run("demo", "sample.guidance_growth=linear")
    for name, guidance in (("dpg", 7.5), ("geneval", 13.0)):
        prompts = published(tmp_path / "prompts", name)
        _, benchmark, _, solving, weights = drawn(
            seen, name, run, "--size=64x64", f"--prompts={prompts}", "--images-per-prompt=1"
        )
        assert solving == Solving((64, 64), 50, guidance, "euler_maruyama", "constant")
        assert (benchmark.num_images, weights) == (1, "trained")


def test_names_of_classes_are_the_runs(make_run: MakeRun, seen: list[Seen], tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(24)]
    # The map is gone; the run has kept it.
    checkpoint = make_run("class_demo", f"classes.map={tmp_path}/gone.txt")
    (checkpoint.parents[1] / "classes.txt").write_text("\n".join(names) + "\n")
    _, _, prompts, _, _ = drawn(seen, "imagenet", checkpoint)
    assert [prompt.category for prompt in prompts] == names
    (tmp_path / "others.txt").write_text("\n".join(names[::-1]) + "\n")
    _, _, prompts, _, _ = drawn(seen, "imagenet", checkpoint, f"--prompts={tmp_path}/others.txt")
    assert [prompt.category for prompt in prompts] == names[::-1]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("class_demo", ["dpg", "RUN", "--prompts=PROMPTS"], "draws from classes .*, and dpg has prompts in words; "),
        ("demo", ["imagenet", "RUN"], "draws from text, and imagenet has classes; name a class-conditional run, or"),
        ("", ["imagenet", "FOLDER"], "FOLDER: draws from text, and imagenet has classes"),
        ("class_demo", ["imagenet", "RUN", "--prompts=MAP"], "MAP: names 2 classes, and the model has 24; name"),
        ("class_demo", ["imagenet", "RUN", "--size=64x64"], "--size 64x64: the head .* so its images are 32x32; leave"),
        ("demo", ["dpg", "RUN", "--prompts=PROMPTS", "--size=60x60"], r"sample.size_px = \[60, 60\]"),
        ("class_demo", ["imagenet", "RUN", "--images-per-prompt=0"], "must be a whole number, at least 1"),
        ("demo", ["dpg", "RUN", "--prompts=PROMPTS", "--images-per-prompt=2"], "dpg wants a square grid"),
        ("class_demo", ["imagenet", "RUN", "--append=in red"], "--append .in red.: imagenet has classes, not words"),
        ("", ["demo-scenes", "FOLDER", "--append=fl\udcf6te"], "--append 'fl.udcf6te': holds what is no character"),
        ("demo", ["demo-scenes", "RUN", "--images"], "--images: demo-scenes has its images as files anyway"),
        ("class_demo", ["imagenet", "RUN", "sample.guidance=3"], "sample.guidance=3: .*; write --guidance 3 instead"),
        ("class_demo", ["imagenet", "RUN", "--dtype=float32"], "no published folder; write run.dtype=float32 instead"),
        ("", ["demo-scenes", "FOLDER", "--weights=averaged"], "--weights averaged: .* has one of its own; leave it"),
        (
            "class_demo",
            ["imagenet", "RUN", "--adapter=style"],
            "--adapter style: .* is no published folder, and adapters",
        ),
        ("class_demo", ["imagenet", "RUN", "--config=class_demo"], "is of a run, which has its own; leave --config"),
        ("class_demo", ["imagenet", "RUN", "classes.num_classes=0"], "classes.num_classes = 0: model.family"),
        ("", ["imagenet", "EXPORT"], r"it is an export: import its model.pt first with `bitdance import .*/model.pt"),
        ("", ["imagenet", "FILE.pt"], "it is a published file: import it first with `bitdance import .*FILE.pt OUT`"),
    ],
)
def test_what_cannot_be_drawn_is_named_before_work(
    config: str,
    arguments: list[str],
    message: str,
    make_run: MakeRun,
    seen: list[Seen],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER/vision_head_config.json").write_text("{}")
    (tmp_path / "EXPORT").mkdir()
    (tmp_path / "EXPORT/model_config.json").write_text("{}")
    (tmp_path / "FILE.pt").write_bytes(b"")
    (tmp_path / "MAP").write_text("goldfish\nshark\n")
    places = {name: str(tmp_path / name) for name in ("FOLDER", "EXPORT", "FILE.pt", "MAP")}
    places |= {"RUN": str(make_run(config)) if config else "", "PROMPTS": str(published(tmp_path / "prompts", "dpg"))}
    pattern = re.compile("|".join(places))
    placed = [pattern.sub(lambda match: places[match[0]], argument) for argument in arguments]
    assert main([*placed, f"--out={tmp_path}/out", "--nproc=2"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not seen and not (tmp_path / "out").exists()


def test_ranks_are_told_all_that_was_asked_for(
    make_run: MakeRun, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def launch(ranks: Ranks, module: str, command: Sequence[str]) -> int:
        assert (ranks.num_processes, module) == (2, "bitdance_scale.cli.evaluate_draw")
        started.append(list(command))
        return 0

    monkeypatch.setattr(evaluate_draw, "launch", launch)
    checkpoint = make_run("class_demo")
    options = ["--images-per-prompt=2", "--steps=5", "--guidance=1.5", "--images", "--seed=4", "--batch-size=3"]
    arguments = ["imagenet", str(checkpoint), "parallel.tensor=2", *options, "--out=drawn"]
    assert main([*arguments, "--nproc=2", "--rdzv-endpoint=node0:29500"]) == 0 and not seen
    command = started.pop()
    # Nothing of where the ranks run, and what was found out.
    assert command[:3] == ["imagenet", str(checkpoint), "parallel.tensor=2"]
    assert {*options, "--out=drawn", "--name=step_00000010", "--weights=averaged"} == {*command[3:]}


def test_the_recipe_of_a_published_network_is_found() -> None:
    for name in ("imagenet_b_1x", "imagenet_l_16x", "imagenet_h_4x"):
        assert published_recipe(load_network(name)) == name
    assert published_recipe(load_network("imagenet_b_4x", ["classes.num_classes=10"])) is None
    assert published_recipe(load_network("demo")) is None


@pytest.mark.parametrize(("prefix", "weights"), [(AVERAGE_PREFIX, "averaged"), (MODEL_PREFIX, "trained")])
def test_an_import_of_a_published_network_has_the_settings_of_its_recipe(
    prefix: str, weights: str, tmp_path: Path, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network("imagenet_b_16x", ["vision.weights=imported/ae.safetensors", "vision.flip_max=0.3"])
    (tmp_path / MANIFEST_NAME).write_text("{}")
    (tmp_path / "config.toml").write_text('[run]\nstart_from = "imported"\n\n' + dump_toml(network))
    index = TensorIndex({f"{prefix}embedding.weight": None}, {})
    monkeypatch.setattr(stored_config, "read_index", lambda folder: index)
    _, _, prompts, solving, drawing = drawn(seen, "imagenet", tmp_path)
    assert solving == Solving((256, 256), 100, 6.1, "euler_maruyama", "linear")
    assert (len(prompts), drawing) == (1000, weights)
    config = stored_config.stored_config(tmp_path, ["parallel.tensor=2"])
    assert (config.vision.weights, config.parallel.tensor) == ("imported/ae.safetensors", 2)


def test_an_import_draws_with_the_settings_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = class_file_content()
    averages = {name: tensor if name.startswith("vae.") else tensor * 0.75 for name, tensor in trained.items()}
    torch.save({"model": trained, "ema": averages}, tmp_path / "file.pt")
    import_release(open_class_source(PickledFile(tmp_path / "file.pt")), tmp_path / "imported")
    out = tmp_path / "drawn"
    command = ["imagenet", str(tmp_path / "imported"), f"--out={out}", "--nproc=1"]
    assert main(command) == 2
    assert "none of the shipped recipes is of its network; name a configuration" in capsys.readouterr().err
    px = "data.resolutions=[{side_px = 8, share = 1, buckets_px = [[8, 8]]}]"
    options = ["--config=class_demo", "--size=8x8", "--steps=2", "--images-per-prompt=2", "--name=small", px]
    assert main([*command, *options]) == 0
    with np.load(out / "samples.npz") as archive:
        assert archive["arr_0"].shape == (6, 8, 8, 3) and archive["arr_0"].std() > 0
        np.testing.assert_array_equal(archive["arr_1"], [0, 1, 2, 0, 1, 2])
    assert Image.open(out / "grid.png").format == "PNG"
    record = json.loads((out / "drawing.json").read_text())
    assert record["model"].items() >= {"name": "small", "weights": "averaged"}.items()
    assert record["settings"].items() >= {"guidance": 2.0, "guidance_growth": "linear", "dtype": "float32"}.items()


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "ours")


def draw(model: Path, out: Path) -> dict[str, Any]:
    prompts = out.with_suffix(".json")
    prompts.write_text(json.dumps({"first": "a red circle"}))
    options = ["--steps", "1", "--guidance", "1", "--size", "32x32", "--nproc", "1"]
    assert main(["dpg", str(model), "--prompts", str(prompts), "--out", str(out), *options]) == 0
    record: dict[str, Any] = json.loads((out / "drawing.json").read_text())
    return record


def test_a_drawing_says_how_many_tokens_are_drawn_at_once_and_one_that_does_not_is_drawn_on(published_folder, tmp_path):
    record = draw(published_folder, tmp_path / "out")
    assert record["model"]["block_tokens"] == 16 and len(record["model"]["sha256"]) == 64
    del record["model"]["block_tokens"]
    (tmp_path / "out/drawing.json").write_text(json.dumps(record))
    before = (tmp_path / "out/first.png").read_bytes()
    (tmp_path / "out/first.png").unlink()
    assert draw(published_folder, tmp_path / "out") == record
    assert (tmp_path / "out/first.png").read_bytes() == before


def test_short_prompts_with_the_guidance_of_the_long_ones_are_warned_of_once(published_folder, tmp_path, caplog):
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    prompts = write_lines(tmp_path / "prompts.jsonl", [line])
    command = ["geneval", str(published_folder), f"--prompts={prompts}", "--images-per-prompt=1", "--size=32x32"]
    caplog.set_level(logging.WARNING)
    assert main([*command, f"--out={tmp_path}/out", "--steps=1", "--nproc=1"]) == 0
    warned = [record.message for record in caplog.records if "published for the long prompts" in record.message]
    assert len(warned) == 1 and "guidance = 13.0: 1 of 1 prompts" in warned[0]
    assert (tmp_path / "out/00000/samples/0000.png").is_file()


def test_a_published_folder_has_the_same_guidance_at_every_block(published_folder, tmp_path, capsys):
    command = ["demo-scenes", str(published_folder), "--size=32x32", "--guidance-growth=linear", "--nproc=1"]
    assert main([*command, f"--out={tmp_path}/out"]) == 2
    assert "--guidance-growth linear: a published folder draws with the same guidance" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_is_given_words_behind_every_prompt(published_folder, tmp_path, monkeypatch, capsys):
    given: list[str] = []
    real = PublishedPrompts.draw

    def draw_and_tell(self: PublishedPrompts, texts: Sequence[str], seeds: Sequence[int]) -> Any:
        given.extend(texts)
        return real(self, texts, seeds)

    monkeypatch.setattr(PublishedPrompts, "draw", draw_and_tell)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"tag": "single_object", "include": [], "prompt": "a bench"}])
    command = ["geneval", str(published_folder), f"--prompts={prompts}", "--images-per-prompt=1", "--size=32x32"]
    command += ["--steps=1", "--nproc=1", f"--out={tmp_path}/out"]
    assert main([*command, "--append=in vermilion"]) == 0
    assert set(given) == {"a bench in vermilion"}
    assert json.loads((tmp_path / "out/drawing.json").read_text())["settings"]["appended"] == "in vermilion"
    assert json.loads((tmp_path / "out/00000/metadata.jsonl").read_text())["prompt"] == "a bench"
    # Without them it is another drawing.
    assert main(command) == 2 and "appended" in capsys.readouterr().err
