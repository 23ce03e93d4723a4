"""What `bitdance evaluate score` refuses, by name, before a network is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.cli import evaluate_score
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.scoring.own_scorers import own_scorer
from bitdance_scale.train.process import EXIT_REFUSED
from tests.unit.evaluation.benchmarks.small_benchmarks import NAMES, TIIF, published, write_lines
from tests.unit.evaluation.distributions.small_network import use_few_features
from tests.unit.evaluation.scoring.small_drawings import draw, read, write_dpg_questions, write_tiif_questions


@pytest.fixture(autouse=True)
def _no_networks(monkeypatch):
    def loads(*details):
        raise AssertionError("a network would have been loaded")

    monkeypatch.setattr(evaluate_score, "load_networks", loads)


@pytest.fixture
def refused(capsys):
    """Calls the command, which must refuse; returns its message."""

    def call(*arguments) -> str:
        assert evaluate_score.main([str(argument) for argument in arguments], "score") == EXIT_REFUSED
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return call


def test_folders_that_are_not_complete(tmp_path, refused):
    root, prompts, _ = draw(tmp_path, "geneval")
    assert "no such folder; draw the images first" in refused(tmp_path / "none")
    (root / "00001/grid.png").unlink()
    message = refused(root, "--prompts", prompts)
    assert "1 of 2 prompts are not complete: prompt 00001 lacks a file that is made of its images" in message
    (root / "00001/samples/0002.png").unlink()
    (root / "00001/samples/0001.png").write_bytes((root / "00001/samples/0001.png").read_bytes()[:-9])
    message = refused(root, "--prompts", prompts)
    assert "00001/samples/0001.png is cut short; prompt 00001 lacks image 1, 2" in message
    (root / "00000/samples/0009.png").write_bytes((root / "00000/samples/0000.png").read_bytes())
    message = refused(root, "--prompts", prompts)
    assert "pictures that are not of this drawing: 00000/samples/0009.png belongs to no prompt" in message


def test_images_of_two_models(tmp_path, refused):
    root, prompts, _ = draw(tmp_path, "tiif")
    (root / "drawing.json").unlink()
    other = root / "text/theirs/short_description/0.png"
    other.parent.mkdir(parents=True)
    Image.new("RGB", (24, 16)).save(other)
    arguments = (root, "--prompts", prompts, "--benchmark", "tiif")
    message = refused(*arguments, "--name", "ours")
    assert "text/theirs/short_description/0.png is of model 'theirs', this drawing of 'ours'" in message
    assert "--name: is missing" in refused(*arguments)
    assert "is of model 'ours', this drawing of 'nobody'" in refused(*arguments, "--name", "nobody")


def test_prompts_of_something_else(tmp_path, refused):
    root, prompts, _ = draw(tmp_path, "geneval")
    assert "no file of prompts is named; name evaluation_metadata.jsonl" in refused(root)
    other = published(tmp_path / "published", "dpg")
    assert f"{other}: holds the prompts of dpg, not of geneval" in refused(root, "--prompts", other)
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    changed = write_lines(tmp_path / "changed.jsonl", [lines[0] | {"prompt": "a long form of it"}, lines[1]])
    message = refused(root, "--prompts", changed)
    assert f"{changed}: holds other prompts than those that were drawn: 2 with the digest " in message
    assert "is of geneval; leave the option out" in refused(root, "--prompts", prompts, "--benchmark", "dpg")
    assert "is of ours; leave the option out" in refused(root, "--prompts", prompts, "--name", "theirs")
    record = read(root / "drawing.json")
    for change, says in (
        ({"layout_version": 7}, "has layout_version 7, and this program reads 1"),
        ({"model": "ours"}, "model = 'ours', expected dict"),
        ({"benchmark": "nothing"}, "benchmark = 'nothing': must be one of"),
    ):
        (root / "drawing.json").write_text(json.dumps(record | change), encoding="utf-8")
        assert says in refused(root, "--prompts", prompts)


def test_metrics_that_do_not_fit(tmp_path, refused):
    root, prompts, _ = draw(tmp_path, "geneval")
    arguments = (root, "--prompts", prompts, "--metric")
    assert "metric = 'nothing': must be one of geneval, dpg, tiif" in refused(*arguments, "nothing")
    assert f"--metric dpg: is of dpg, and {root} is of geneval" in refused(*arguments, "dpg")
    message = refused(*arguments, "text")
    assert "none of the 2 prompts of geneval asks for a text in quotes" in message
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (4, 4)).save(pictures / "a.png")
    assert f"--metric clip-score: {pictures} is of no benchmark" in refused(pictures, "--metric", "clip-score")
    assert "name --benchmark and --name for a folder" in refused(pictures, "--prompts", prompts)
    assert "is no folder, and the images of dpg lie in one" in refused(prompts, "--benchmark", "dpg", "--name", "a")
    (tmp_path / "classes").mkdir()
    root, _, _ = draw(tmp_path / "classes", "imagenet")
    assert "the prompts of imagenet are numbers of classes" in refused(root, "--metric", "clip-score")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("oneig")])
def test_oneig_is_scored_by_its_own_scorer(tmp_path, refused, name):
    root, prompts, _ = draw(tmp_path, name)
    message = refused(root, "--prompts", prompts)
    assert f"the scorer of {name} is not reproduced here" in message
    assert f"set mode={name[-2:].upper()}, image_dir={root}, model_names=ours and image_grid=2 in run_over" in message
    assert "--metric text" in message and "--metric clip-score" in message


@pytest.mark.parametrize(
    ("name", "num_images", "says"),
    [
        ("oneig-en", 1, "image_grid=1 in run_overall.sh"),
        ("oneig-en", 9, "image_grid=3 in run_overall.sh"),
        ("dpg", 1, "GPUs (PROCESSES=, 8)) takes this folder: PIC_NUM=1 bash dpg_bench/dist_eval.sh /drawn 16"),
        ("dpg", 9, "and scores 4 of the 9 images of a prompt) takes this folder: PIC_NUM=4 bash dpg"),
    ],
)
def test_own_scorers_are_told_how_many_images_a_picture_has(name, num_images, says):
    benchmark = dataclasses.replace(find_benchmark(name), num_images=num_images)
    assert says in own_scorer(benchmark, Path("/drawn"), "ours", (16, 24))


def test_questions_and_judges(tmp_path, refused, monkeypatch):
    root, prompts, _ = draw(tmp_path, "dpg")
    arguments = [root, "--prompts", prompts]
    own = f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {root} 16"
    message = refused(*arguments)
    assert "ConfigError: --questions: DPG-Bench is scored by its published questions; name dpg_bench.csv" in message
    assert own in message
    assert "none.csv: does not exist" in refused(*arguments, "--questions", tmp_path / "none.csv")
    assert "dpg.prompts: has no column item_id" in refused(*arguments, "--questions", prompts)
    few = write_dpg_questions(tmp_path / "few.csv", {"0": 2, "partiprompts12": 1, "whale": 1})
    message = refused(*arguments, "--questions", few)
    assert "about 2 of the 3 prompts" in message and "about 1 others" in message
    assert "(prompt COCOval2014000000000042; questions about whale)" in message

    arguments += ["--questions", write_dpg_questions(tmp_path / "dpg_bench.csv")]
    message = refused(*arguments)
    assert "--judge or --endpoint: DPG-Bench asks a model" in message and own in message
    url = "http://localhost:9/v1"
    assert "--judge and --endpoint: both are named" in refused(*arguments, "--judge", "a", "--endpoint", url)
    assert "--judge-model: is missing" in refused(*arguments, "--endpoint", url)
    assert "--judge-model m: is of an endpoint" in refused(*arguments, "--judge", "a", "--judge-model", "m")
    assert "is no address of an endpoint" in refused(*arguments, "--endpoint", "localhost", "--judge-model", "m")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    asked = [*arguments, "--endpoint", url, "--judge-model", "m"]
    assert "NO_SUCH_KEY is not set or empty" in refused(*asked, "--key-variable", "NO_SUCH_KEY")
    (root / "notes.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    assert "notes.jsonl: line 1 is no answer of a judge" in refused(*asked, "--answers", root / "notes.jsonl")
    assert "--max-unclear 7.0: must be a share" in refused(*asked, "--max-unclear", 7)
    assert "--device nothing: cannot be used" in refused(*asked, "--device", "nothing")


def test_questions_of_tiif(tmp_path, refused):
    root, prompts, _ = draw(tmp_path, "tiif")
    questions = write_tiif_questions(tmp_path / "questions")
    message = refused(root, "--prompts", prompts, "--questions", prompts)
    assert "name the files of questions (testmini_eval_prompts), not those of prompts" in message
    message = refused(root, "--prompts", prompts, "--questions", questions)
    assert f"eval_with_vlm.py --jsonl_dir data/testmini_eval_prompts --image_dir {root} --eval_model ours" in message
    write_lines(questions / "text_eval_prompts.jsonl", [])
    (questions / "text_eval_prompts.jsonl").unlink()
    message = refused(root, "--prompts", prompts, "--questions", questions)
    assert f"about 4 of the {2 * sum(map(len, TIIF.values()))} prompts" in message
    assert "(prompt text/long_description/0; prompt text/short_description/0)" in message


def test_packages_weights_and_references(tmp_path, refused, monkeypatch):
    (tmp_path / "classes").mkdir()
    root, _, _ = draw(tmp_path / "classes", "imagenet")
    own = f"python evaluator.py VIRTUAL_imagenet256_labeled.npz {root / 'samples.npz'}"
    message = refused(root)
    assert "--inception: sets of images are compared by Inception" in message and own in message
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"no weights")
    message = refused(root, "--inception", weights)
    assert "--reference: names what the images are compared with" in message and own in message
    np.savez(tmp_path / "real.npz", np.zeros((3, 16, 24, 3), np.uint8))
    arguments = (root, "--inception", weights, "--reference")
    assert "there is no such folder or .npz of a reference" in refused(*arguments, tmp_path / "none.npz")
    message = refused(*arguments, tmp_path / "real.npz")
    assert "inception.pth" in message and own in message
    message = refused(*arguments, tmp_path / "real.npz", "--save-reference", tmp_path / "real.npz")
    assert "real.npz: exists; name a new file" in message
    assert "there is no folder" in refused(*arguments, tmp_path / "real.npz", "--save-reference", tmp_path / "a/b.npz")
    use_few_features(monkeypatch)
    np.savez(tmp_path / "made.npz", mu=np.zeros(6), sigma=np.eye(6))
    message = refused(*arguments, tmp_path / "made.npz", "--save-reference", tmp_path / "new.npz")
    assert "made.npz holds statistics already" in message

    (tmp_path / "text").mkdir()
    root, prompts, _ = draw(tmp_path / "text", "tiif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    message = refused(root, "--prompts", prompts, "--metric", "text")
    assert "onnxruntime is not installed" in message


def test_missing_weights_are_said_with_the_way_out(tmp_path, capsys, monkeypatch):
    from bitdance_scale.evaluation.scoring.scoring import load_networks

    monkeypatch.setattr(evaluate_score, "load_networks", load_networks)
    root, prompts, _ = draw(tmp_path, "geneval")
    none = tmp_path / "none"
    code = evaluate_score.main([str(root), "--prompts", str(prompts), "--detector", str(none), "--clip", str(none)])
    message = capsys.readouterr().err
    assert code == EXIT_REFUSED
    assert f"the detector: {none}: " in message and f"CLIP: {none}: " in message
    assert f"python evaluate_images.py {root} --outfile results.jsonl --model-path DETECTOR_FOLDER" in message
    assert "python summary_scores.py results.jsonl" in message
    (tmp_path / "dpg").mkdir()
    root, prompts, _ = draw(tmp_path / "dpg", "dpg")
    questions = write_dpg_questions(tmp_path / "dpg_bench.csv")
    arguments = [root, "--prompts", prompts, "--questions", questions, "--judge", none]
    assert evaluate_score.main([str(argument) for argument in arguments]) == EXIT_REFUSED
    message = capsys.readouterr().err
    assert "none: cannot be loaded" in message and f"dist_eval.sh {root} 16" in message
