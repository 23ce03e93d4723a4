"""Models of every kind draw for the page what they draw elsewhere."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.app.drawing import Studio
from bitdance_scale.app.settings import DrawSettings
from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.stored_config import stored_config
from bitdance_scale.config.schema import ParallelSection
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.evaluation.benchmarks.solving import Solving, drawing_config
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.sampling_file import write_sampling
from bitdance_scale.train.drawer import find_model
from bitdance_scale.train.prompt_models import RunPrompts
from bitdance_scale.train.run import joined_ranks
from tests.adapted import write_adapted_run
from tests.released import class_file_content, write_published


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("app") / "small")


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "imported"
    import_release(open_source(published, None), folder)
    return folder


def draw(drawer, settings: DrawSettings, max_previews: int = 12) -> list[np.ndarray]:
    last = list(Studio(drawer, max_previews).draw(settings, threading.Event()))[-1]
    assert last.is_finished
    return list(last.images)


def test_a_published_folder_draws_as_its_pipeline_does_watched_or_not(published):
    settings = DrawSettings("a red circle", 32, 48, 2, 3.0, 5, 2)
    with find_model(published, device="cpu").load() as drawer:
        assert (drawer.facts.name, drawer.facts.steps, drawer.facts.guidance) == ("small", 50, 7.5)
        assert drawer.facts.sizes_px == [(32, 32), (64, 64), (128, 128)] and drawer.facts.subject == "Prompt"
        watched, unwatched = draw(drawer, settings), draw(drawer, settings, max_previews=0)
    expected = BitDancePipeline.from_pretrained(published, device="cpu")(
        ["a red circle"] * 2,
        32,
        48,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    ).images
    for image, other, wanted in zip(watched, unwatched, expected, strict=True):
        assert (image == other).all() and (image == np.asarray(wanted)).all()
    assert (watched[0] != watched[1]).any()


def test_a_published_folder_may_say_how_it_is_drawn_with(published, tmp_path):
    own = shutil.copytree(published, tmp_path / "own")
    write_sampling(own, {"size_px": [64, 96], "num_steps": 20, "guidance": 3.0, "sampler": "euler"})
    facts = find_model(own).facts
    assert (facts.steps, facts.guidance, facts.sampler) == (20, 3.0, "euler")
    assert facts.sizes_px == [(64, 96), (32, 32), (64, 64), (128, 128)]


def test_a_checkpoint_draws_as_benchmarks_do_watched_or_not(imported):
    settings = DrawSettings("a blue square", 32, 64, 2, 2.0, 9, 2)
    with find_model(imported, config_name="demo").load() as drawer:
        assert drawer.facts.name.startswith("demo, step_") and (drawer.facts.steps, drawer.facts.guidance) == (20, 3.0)
        assert drawer.facts.sizes_px[:4] == [(64, 64), (64, 96), (96, 64), (64, 128)]
        watched, unwatched = draw(drawer, settings), draw(drawer, settings, max_previews=0)
        # Sizes, steps and guidance differ from drawing to drawing.
        assert draw(drawer, DrawSettings("a", 32, 32, 1, 1.0, 0, 1))[0].shape == (32, 32, 3)
    checkpoint = find_checkpoint(imported)
    config = drawing_config(
        stored_config(checkpoint, [], "demo"), Solving((32, 64), 2, 2.0, "euler_maruyama"), "trained"
    )
    with joined_ranks(ParallelSection()) as topology:
        expected = RunPrompts(config, checkpoint, topology).draw(["a blue square"] * 2, [9, 10])
    assert expected is not None
    for image, other, wanted in zip(watched, unwatched, expected, strict=True):
        assert (image == other).all() and (image == wanted).all()


def test_a_class_conditional_model_has_classes_and_one_size(tmp_path):
    torch.save({"model": class_file_content()}, tmp_path / "small.pt")
    import_release(open_class_source(PickledFile(tmp_path / "small.pt")), tmp_path / "imported")
    size = "data.resolutions=[{side_px=8, share=1, buckets_px=[[8, 8]]}]"
    with find_model(tmp_path / "imported", config_name="class_demo", overrides=[size]).load() as drawer:
        facts = drawer.facts
        assert (facts.num_classes, facts.subject) == (3, "Class")
        assert list(facts.sizes_px) == [tuple(side * facts.vision.downsample for side in (4, 4))]
        size = facts.sizes_px[0]
        first, other = (draw(drawer, DrawSettings(name, *size, 2, 2.0, 0, 1))[0] for name in ("0", "2"))
        assert first.shape == (*size, 3) and (first != other).any()
        with pytest.raises(ConfigError, match="class 'a cat': must be the number of a class, 0 to 2"):
            draw(drawer, DrawSettings("a cat", *size, 2, 2.0, 0, 1))


def test_adapters_act_as_much_as_a_drawing_says(published, imported, tmp_path):
    style = write_adapted_run(imported, tmp_path / "style")
    other = write_adapted_run(imported, tmp_path / "more/style", seed=1)
    plain = DrawSettings("a red circle", 32, 32, 2, 2.0, 3, 1, {"style": 0.0, "style (2)": 0.0})
    weighted = dataclasses.replace(plain, adapters={"style": 0.5, "style (2)": -1.0})
    with find_model(published, device="cpu", adapters=[str(style), f"{other}=0.25"]).load() as drawer:
        assert drawer.facts.adapters == {"style": 1.0, "style (2)": 0.25}
        found = [draw(drawer, settings)[0] for settings in (weighted, plain, weighted)]

    def expected(*adapters: str) -> np.ndarray:
        pipeline = BitDancePipeline.from_pretrained(published, device="cpu", adapters=parse_adapters(adapters))
        images = pipeline(
            "a red circle", 32, 32, 2, 2.0, generator=[torch.Generator().manual_seed(3)], output_type="pil"
        ).images
        return np.asarray(images[0])

    assert (found[1] == expected()).all() and (found[0] != found[1]).any()
    assert (found[0] == expected(f"{style}=0.5", f"{other}=-1")).all() and (found[2] == found[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["run.dtype=float32"]}, "is a published folder.* leave out run.dtype=float32"),
        ({"config_name": "demo"}, "is a published folder.* leave out --config"),
    ],
)
def test_options_of_a_run_are_refused_for_a_published_folder(published, options, message):
    with pytest.raises(ConfigError, match=message):
        find_model(published, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapters": ["style"]},
            "^--adapter style: .*imported is no published folder.* `bitdance export .*imported FOLDER`",
        ),
        ({"dtype": "float32"}, "^--dtype float32: .* is no published folder; write run.dtype=float32 instead"),
        ({"device": "cpu"}, "^--device cpu: .* is no published folder; leave it out"),
        ({}, "is an import, which has no settings of a run.* --config"),
    ],
)
def test_options_of_a_published_folder_are_refused_for_an_import(imported, options, message):
    with pytest.raises(ConfigError, match=message):
        find_model(imported, **options)


def test_what_is_no_model_is_refused(tmp_path):
    kinds = "name a published folder, a run, a checkpoint or an import"
    with pytest.raises(ConfigError, match=f"MODEL .*absent: no such folder; {kinds}"):
        find_model(tmp_path / "absent")
    begun, data = tmp_path / "begun", tmp_path / "data"
    for folder in (begun, data):
        folder.mkdir()
        with pytest.raises(ConfigError, match=f"MODEL .*{folder.name}: is an empty folder; {kinds}"):
            find_model(folder)
    (data / "00000.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"MODEL .*data: is no model; {kinds}"):
        find_model(data)
    (begun / "config.toml").write_text("")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="begun.*wait for the run's first .*name a run that has saved one"):
            find_model(begun)
        (begun / "checkpoints").mkdir(exist_ok=True)
