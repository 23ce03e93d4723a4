"""Every metric through the command, from drawn folders to tables and files, with small networks and stub servers."""

from __future__ import annotations

import json
import logging
import os
import signal

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.cli.evaluate_score import main
from bitdance_scale.evaluation.clip import load_clip
from bitdance_scale.evaluation.distributions.features import collect
from bitdance_scale.evaluation.distributions.reference import make_reference
from bitdance_scale.evaluation.distributions.scores import compare
from bitdance_scale.evaluation.geneval import detector, scorer
from bitdance_scale.evaluation.geneval.preprocessing import Preprocessing
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import read_scores
from bitdance_scale.evaluation.scoring import text
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REFUSED, EXIT_REQUEUE
from tests.unit.evaluation.benchmarks.small_benchmarks import GENEVAL, image, write_lines
from tests.unit.evaluation.distributions.small_network import SmallNetwork, use_few_features
from tests.unit.evaluation.geneval.small_networks import save_clip, save_mask2former
from tests.unit.evaluation.questions.small_vilt import save_vilt
from tests.unit.evaluation.questions.stub_endpoint import running_server
from tests.unit.evaluation.scoring.small_drawings import (
    MODEL,
    draw,
    plain,
    read,
    write_dpg_questions,
    write_tiif_questions,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running_server() as running:
        yield running


def score(*arguments) -> int:
    return main([str(argument) for argument in arguments], "score")


def values_of(root, metric):
    """The scores in a folder and the values of the metric."""
    found = read_scores(root / "scores" / f"{metric}.json")
    return found, {name: one.value for name, one in estimates(found.images, find_metric(metric).combine).items()}


def test_geneval(tmp_path, clip, monkeypatch, capsys):
    mask2former = save_mask2former(tmp_path / "mask2former")
    load = detector.load_detector
    # The default preparation is of 1333 x 800 pixels.
    monkeypatch.setattr(scorer, "load_detector", lambda source, _: load(source, Preprocessing(64, 96)))
    # What the random detector sees in the image of the first prompt is asked for, so that not all are wrong.
    size_px = (48, 40)
    networks = scorer.load_scorer(str(mask2former), str(clip))

    def random(prompt, k):
        return np.random.default_rng([*prompt.id.encode(), k]).integers(0, 256, (*size_px, 3), dtype=np.uint8)

    class First:
        id = "00000"

    (seen,) = networks([random(First, 0)], [GENEVAL[0]])
    name = next(iter(seen.objects))
    records = [{**GENEVAL[0], "include": [{"class": name, "count": 1}]}, GENEVAL[1]]
    root, prompts, drawn = draw(
        tmp_path, "geneval", random, write_lines(tmp_path / "metadata.jsonl", records), size_px=size_px
    )
    arguments = (root, "--prompts", prompts, "--detector", mask2former, "--clip", clip, "--batch-size", 3)
    assert score(*arguments) == EXIT_COMPLETE
    found, values = values_of(root, "geneval")
    expected = [networks([random(prompt, k)], [prompt.record])[0] for prompt in drawn for k in range(4)]
    assert [image.value for image in found.images] == [float(verdict.correct) for verdict in expected]
    assert [image.reason for image in found.images] == ["; ".join(verdict.reasons) for verdict in expected]
    assert found.images[0].value == 1
    assert (found.benchmark, found.model, found.drawing) == ("geneval", MODEL, read(root / "drawing.json"))
    assert found.scorer == {"detector": str(mask2former), "clip": str(clip)}
    assert found.prompts == {prompt.id: prompt.text for prompt in drawn}
    # As summary_scores.py of GenEval computes them.
    lines = [json.loads(line) for line in (root / "scores/geneval_results.jsonl").read_text().splitlines()]
    assert {(root / line["filename"]).is_file() for line in lines} == {True}
    by_tag, by_prompt = {}, {}
    for line in lines:
        by_tag.setdefault(line["tag"], []).append(line["correct"])
        by_prompt.setdefault(line["metadata"], []).append(line["correct"])
    assert values[OVERALL] == pytest.approx(np.mean([np.mean(correct) for correct in by_tag.values()]))
    assert found.figures["images"] == np.mean([line["correct"] for line in lines])
    assert found.figures["prompts"] == np.mean([any(correct) for correct in by_prompt.values()])
    assert found.notes == (
        "no prompts of two_object, colors, position, color_attr: the score is not that of published tables",
    )
    output = capsys.readouterr().out
    assert f"GenEval of {MODEL}: 2 prompts, 8 images" in output
    assert output.rstrip().endswith(str(root / "scores/geneval.json"))


def grey_is_yes(count, question):
    """To the stub server's questions: the second one of an item is answered no, and one with neither."""
    if question.startswith("partiprompts12 2?"):
        return "hm"
    return "no" if question.startswith("0 2?") else "Yes."


def test_dpg_by_an_endpoint(tmp_path, server, monkeypatch, capsys):
    root, prompts, drawn = draw(tmp_path, "dpg")
    questions = write_dpg_questions(tmp_path / "dpg_bench.csv")
    server.behave = grey_is_yes
    monkeypatch.setenv("MY_KEY", "sk-secret-0123456789")
    arguments = (root, "--prompts", prompts, "--questions", questions, "--endpoint", server.url)
    arguments += ("--judge-model", "a-model", "--key-variable", "MY_KEY", "--max-unclear", 0.2)
    assert score(*arguments) == EXIT_COMPLETE
    found, values = values_of(root, "dpg")
    assert values == pytest.approx(
        {OVERALL: (0.5 + 0.5 + 1) / 3, "attribute": 1 / 3, "attribute - color": 1 / 3}
        | dict.fromkeys(("entity", "entity - whole"), 1)
    )
    # The script does not know the first row, so that the first prompt, which depends on it, is left out.
    assert found.figures == pytest.approx(
        {"as published": 0.75}
        | dict.fromkeys(("as published: attribute", "as published: attribute - color"), 0.5)
        | dict.fromkeys(("as published: entity", "as published: entity - whole"), 1)
    )
    assert [note[:41] for note in found.notes] == [
        "4 of 24 answers (16.7%) were neither yes ", "as published leaves out 1 prompts, as the",
    ]  # fmt: skip
    assert {image.category for image in found.images} == {prompt.category for prompt in drawn}
    assert (found.images[0].reason, found.images[4].reason) == ("0 2? no", "partiprompts12 2? unclear")
    assert found.scorer["judge"] == "a-model" and "temperature 0" in found.scorer["protocol"]
    assert len(server.requests) == 24
    assert "as published" in capsys.readouterr().out
    # Nothing that was answered is asked again, and no file holds the key.
    assert score(*arguments) == EXIT_COMPLETE
    assert len(server.requests) == 24
    assert "sk-secret" not in "".join(path.read_text(encoding="utf-8") for path in (root / "scores").iterdir())
    # The share of unclear answers is the user's.
    assert score(*arguments[:-1], 0.1) == EXIT_REFUSED
    assert "answered 4 of 24 questions (16.7%) with neither" in capsys.readouterr().err


def test_dpg_by_a_local_judge(tmp_path):
    judge = save_vilt(tmp_path / "vilt")
    root, prompts, _ = draw(tmp_path, "dpg")
    questions = write_dpg_questions(tmp_path / "dpg_bench.csv")
    answers = tmp_path / "kept.jsonl"
    code = score(root, "--prompts", prompts, "--questions", questions, "--judge", judge, "--answers", answers,
                 "--max-unclear", 1, "--device", "cpu")  # fmt: skip
    assert code == EXIT_COMPLETE
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert {line["answer"] for line in lines} <= {"yes", "no", "a dog"} and len(lines) == 24
    assert not (root / "scores/answers.jsonl").exists()
    found, values = values_of(root, "dpg")
    assert found.scorer["judge"] == str(judge)
    # Of an item's first questions: the share of yes.
    yes = [line["answer"] == "yes" for line in lines if "1?" in line["question"]]
    assert values["entity"] == pytest.approx(np.mean(yes))


def test_tiif(tmp_path, server, capsys):
    root, prompts, _ = draw(tmp_path, "tiif")
    questions = write_tiif_questions(tmp_path / "questions")

    # All questions of an image are one request, of which the last is answered with one line only.
    def behave(count, question):
        if "one word" in question:
            return "yes"
        return "yes" if len([one for one in server.requests if "Is A?" in json.dumps(one)]) == 6 else "yes\nno"

    server.behave = behave
    arguments = (root, "--prompts", prompts, "--questions", questions, "--endpoint", server.url, "--judge-model", "m")
    assert score(*arguments) == EXIT_COMPLETE
    found, values = values_of(root, "tiif")
    assert len(server.requests) == 6 + 2 and server.requests[0]["messages"][0]["role"] == "system"
    assert len(found.images) == 6 and sum(image.value == 0.5 for image in found.images) == 1
    assert values[OVERALL] == pytest.approx((values["short: overall"] + values["long: overall"]) / 2)
    wrong = next(image for image in found.images if image.value == 0.5)
    assert wrong.reason == "Is B? yes"
    assert found.notes[0].startswith("the questions on 1 of 6 images were asked one by one")
    assert found.notes[1].startswith("no prompts of shape+color, ")
    assert "short: relation" in capsys.readouterr().out


def test_what_was_answered_before_a_stop_is_kept(tmp_path, server, capsys):
    root, prompts, _ = draw(tmp_path, "dpg")
    questions = write_dpg_questions(tmp_path / "dpg_bench.csv")

    def behave(count, question):
        if len(server.requests) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return "yes"

    server.behave = behave
    arguments = (root, "--prompts", prompts, "--questions", questions, "--endpoint", server.url, "--judge-model", "m")
    assert score(*arguments) == EXIT_REQUEUE
    assert "stopped on request; run again" in capsys.readouterr().err
    assert not (root / "scores/dpg.json").exists()
    asked = len(server.requests)
    assert 5 <= asked < 24
    assert len((root / "scores/answers.jsonl").read_text(encoding="utf-8").splitlines()) == asked
    server.behave = lambda count, question: "yes"
    assert score(*arguments) == EXIT_COMPLETE
    assert len(server.requests) == 24
    assert values_of(root, "dpg")[1][OVERALL] == 1


class Reader:
    """Reads what the first value of an image says."""

    says = ("A/B", "a and c", "")

    def __init__(self, num_threads):
        assert num_threads >= 1

    def read(self, image):
        line = self.says[image[0, 0, 0] % 3]
        return [line] if line else []


def test_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "TextReader", Reader)
    monkeypatch.setattr(text, "check_packages", lambda: None)
    root, prompts, _ = draw(tmp_path, "tiif", lambda prompt, k: plain(0))
    assert score(root, "--prompts", prompts, "--metric", "text") == EXIT_COMPLETE
    found, values = values_of(root, "text")
    # Of the two prompts of the dimension "text" the long one has no quotes; that of another dimension does not count.
    assert [image.prompt_id for image in found.images] == ["text/short_description/0"]
    assert values == {OVERALL: 1, "text": 1}
    assert found.figures == {"images with exactly the text": 1, "mean edit distance": 0}
    assert found.notes == ("1 of 2 prompts have no text in quotes; their images are left out",)
    assert "100.00" in capsys.readouterr().out

    (tmp_path / "more").mkdir()
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"x1": 'signs "A" and "B C"', "x2": "none"}), encoding="utf-8")
    root, _, _ = draw(tmp_path / "more", "dpg", lambda prompt, k: plain(k), prompts)
    assert score(root, "--prompts", prompts, "--metric", "text") == EXIT_COMPLETE
    found, values = values_of(root, "text")
    # Of a, b and c: "A/B" is one other word, "a and c" has two of them, then nothing, then the first again.
    assert [image.value for image in found.images] == [0, pytest.approx(2 / 3), 0, 0]
    assert values[OVERALL] == pytest.approx(2 / 12)
    assert found.images[2].reason == "wanted: A / B C; read: nothing"


def test_text_of_oneig_is_of_its_category(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "TextReader", Reader)
    monkeypatch.setattr(text, "check_packages", lambda: None)
    prompts = tmp_path / "OneIG-Bench.csv"
    rows = ["category,id,prompt_en", 'Portrait,000,"a ""nun"""', 'Text_Rendering,000,"says ""A/B"""']
    prompts.write_text("\n".join(rows), encoding="utf-8")
    root, _, _ = draw(tmp_path, "oneig-en", lambda prompt, k: plain(0), prompts)
    assert score(root, "--prompts", prompts, "--metric", "text") == EXIT_COMPLETE
    found, values = values_of(root, "text")
    assert [(image.prompt_id, image.k) for image in found.images] == [("text/000", k) for k in range(4)]
    assert values == {OVERALL: 1, "Text_Rendering": 1} and found.notes == ()


def test_text_is_read_offline(tmp_path):
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from PIL import ImageDraw, ImageFont

    size_px = (400, 400)

    def written(prompt, k):
        picture = Image.new("RGB", size_px[::-1], "white")
        words = "GRAND OPENING" if k < 3 else "grand"
        ImageDraw.Draw(picture).text((30, 30), words, fill="navy", font=ImageFont.load_default(40))
        return np.asarray(picture)

    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"x1": "a shop that says 'Grand Opening'"}), encoding="utf-8")
    root, _, _ = draw(tmp_path, "dpg", written, prompts, size_px)
    assert score(root, "--prompts", prompts, "--metric", "text") == EXIT_COMPLETE
    found, values = values_of(root, "text")
    assert [image.value for image in found.images] == [1, 1, 1, 0.5]
    assert values[OVERALL] == pytest.approx(7 / 8)


def test_clip_score(tmp_path, clip, capsys):
    root, prompts, drawn = draw(tmp_path, "dpg")
    arguments = (root, "--prompts", prompts, "--metric", "clip-score", "--clip", clip, "--batch-size", 5)
    assert score(*arguments) == EXIT_COMPLETE
    found, values = values_of(root, "clip-score")
    network = load_clip(str(clip))
    cosines = [
        float((network.embed_images([image(prompt, k)]) * network.embed_texts([prompt.text])).sum())
        for prompt in drawn
        for k in range(4)
    ]
    # Embeddings are float32 and their batches others.
    assert [one.value for one in found.images] == pytest.approx([100 * max(x, 0) for x in cosines], abs=1e-3)
    assert values[OVERALL] == pytest.approx(np.mean([one.value for one in found.images]))
    assert values["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert set(values) == {OVERALL, "cosine", *(prompt.category for prompt in drawn if prompt.category)}
    assert "CLIP score of ours: 3 prompts, 12 images" in capsys.readouterr().out

    # The same folder as another program might have drawn it.
    (root / "drawing.json").unlink()
    assert score(*arguments, "--benchmark", "dpg", "--name", "theirs") == EXIT_COMPLETE
    theirs, others = values_of(root, "clip-score")
    assert (others, theirs.model, theirs.drawing) == (values, "theirs", {})


@pytest.fixture
def few_features(monkeypatch):
    from bitdance_scale.evaluation import inception

    use_few_features(monkeypatch)
    monkeypatch.setattr(inception, "load_inception", lambda path: SmallNetwork())
    monkeypatch.setattr(inception, "check_inception_weights", lambda path: None)


def noise(number, seed):
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)


def test_distribution(tmp_path, few_features, capsys, caplog):
    real, drawn = noise(30, 0), noise(6, 1)
    np.savez(tmp_path / "real.npz", real)
    root, _, prompts = draw(tmp_path, "imagenet", lambda prompt, k: drawn[3 * int(prompt.text) + k], size_px=(4, 4))
    arguments = (root, "--inception", "w.pth", "--reference", tmp_path / "real.npz", "--batch-size", 4)
    caplog.set_level(logging.INFO)
    assert score(*arguments, "--save-reference", tmp_path / "saved.npz") == EXIT_COMPLETE
    assert "reference: 30 of 30 images, " in caplog.text and "recall: 6 of 6 images, " in caplog.text
    found = read_scores(root / "scores/distribution.json")
    network = SmallNetwork()
    against = make_reference(collect([real], network), "real")
    # Images come in turns, one of every class; only the parts of the Inception Score depend on it.
    expected = compare(collect([drawn[[0, 3, 1, 4, 2, 5]]], network), against, network.weight.device)
    assert found.figures == pytest.approx(
        {"FID": expected.fid, "sFID": expected.sfid, "Inception Score": expected.inception_score}
        | {"precision": expected.precision, "recall": expected.recall}
    )
    assert (found.images, found.benchmark) == ((), "imagenet") and len(prompts) == 2
    assert found.scorer["inception"] == network.digest and found.scorer["num_images"] == 6
    assert any("of 6 samples; these scores are reported of 50000" in note for note in found.notes)
    assert any("in turns" in note for note in found.notes)
    output = capsys.readouterr().out
    assert f"FID, sFID, IS, precision, recall of {MODEL}\n" in output and "FID" in output

    # Any images, as an .npz, a folder, or out of the grids of another benchmark; a saved reference is as good.
    np.savez(tmp_path / "samples.npz", drawn[[0, 3, 1, 4, 2, 5]])
    (tmp_path / "pictures").mkdir()
    for place, one in enumerate(drawn[[0, 3, 1, 4, 2, 5]]):
        Image.fromarray(one).save(tmp_path / "pictures" / f"{place}.png")
    for source, folder in (("samples.npz", "samples"), ("pictures", "pictures")):
        assert score(tmp_path / source, *arguments[1:3], "--reference", tmp_path / "saved.npz") == EXIT_COMPLETE
        again = read_scores(tmp_path / folder / "scores/distribution.json")
        assert again.figures == pytest.approx(found.figures)
        assert (again.benchmark, again.model, again.drawing) == ("", folder, {})
    (tmp_path / "dpg").mkdir()
    root, prompts, _ = draw(tmp_path / "dpg", "dpg", lambda prompt, k: noise(4, len(prompt.text))[k], size_px=(4, 4))
    assert score(root, "--prompts", prompts, "--metric", "distribution", *arguments[1:]) == EXIT_COMPLETE
    assert read_scores(root / "scores/distribution.json").scorer["num_images"] == 12


def test_several_metrics(tmp_path, clip, monkeypatch, capsys):
    monkeypatch.setattr(text, "TextReader", Reader)
    monkeypatch.setattr(text, "check_packages", lambda: None)
    root, prompts, _ = draw(tmp_path, "tiif", lambda prompt, k: plain(len(prompt.text)))
    assert score("--metric", "text", "clip-score", "text", "--clip", clip, "--prompts", prompts, root) == EXIT_COMPLETE
    assert sorted(path.name for path in (root / "scores").iterdir()) == ["clip-score.json", "text.json"]
    assert capsys.readouterr().out.count(" images\n") == 2
    # Scores are no pictures: the folder is as complete as before.
    assert score("--metric", "text", "--prompts", prompts, root) == EXIT_COMPLETE
