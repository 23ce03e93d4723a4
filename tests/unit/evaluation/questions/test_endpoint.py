"""The endpoint's judge against a server of the standard library that fails in all ways."""

from __future__ import annotations

import base64
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.questions.endpoint import EndpointJudge, Patience
from bitdance_scale.evaluation.questions.judge import JudgeError, KeptAnswers, yes_or_no
from tests.unit.evaluation.questions.stub_endpoint import Server, running_server

KEY = "sk-very-secret-0123456789"
# Servers answer late where cores are busy.
QUICK = Patience(timeout_s=60, num_tries=4, first_wait_s=0.01)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running_server() as running:
        yield running


def image(value: int = 7) -> np.ndarray:
    pixels = np.full((3, 4, 3), value, np.uint8)
    pixels[0, 1] = (1, 2, 3)
    return pixels


def judge_at(server: Server, monkeypatch=None, **options) -> EndpointJudge:
    if monkeypatch is not None:
        monkeypatch.setenv("MY_KEY", f"{KEY}\n")
        options["key_variable"] = "MY_KEY"
    return EndpointJudge(server.url, "a-model", **{"patience": QUICK, **options})


def test_what_is_sent(server, monkeypatch):
    judge = judge_at(server, monkeypatch, system="You look closely.")
    assert judge.answer([image()], ["Is it grey?"]) == ["yes"]
    (request,), (headers,) = server.requests, server.headers
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "a-model", 0)
    system, user = request["messages"]
    assert system == {"role": "system", "content": "You look closely."}
    text, picture = user["content"]
    assert (user["role"], text) == ("user", {"type": "text", "text": "Is it grey?"})
    kind, content = picture["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), image())
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in json.dumps(judge.__dict__, default=str) and judge.model == "a-model"


def test_what_passes_is_tried_again(server):
    def behave(count, question):
        if count > 2:
            return "no"
        return {
            "429": (429, "slow down", ("Retry-After", "0.05")),
            "500": (500, "oops"),
            "503": (503, "later", ("Retry-After", "tomorrow")),
            "gone": None,
            "nonsense": (200, "<html>busy</html>"),
            "other": (200, '{"choices": []}'),
        }[question]

    server.behave = behave
    questions = ["429", "500", "503", "gone", "nonsense", "other"]
    assert judge_at(server).answer([image()] * 6, questions) == ["no"] * 6
    counts = dict.fromkeys(questions, 0)
    for request in server.requests:
        counts[request["messages"][0]["content"][0]["text"]] += 1
    assert counts == dict.fromkeys(questions, 3)


def test_a_silent_server_is_tried_again(server):
    goes_on = threading.Event()

    def behave(count, question):
        if count == 1:
            goes_on.wait(60)
            return None
        return "no"

    server.behave = behave
    patience = Patience(timeout_s=0.3, num_tries=50, first_wait_s=0.01)
    try:
        assert judge_at(server, patience=patience).answer([image()], ["a"]) == ["no"]
    finally:
        goes_on.set()
    assert len(server.requests) >= 2


def test_what_stays_is_an_error_after_so_many_tries(server):
    server.behave = lambda count, question: (500, "out of memory")
    with pytest.raises(JudgeError, match=r"gave no answer in 4 tries, last 500 .*out of memory"):
        judge_at(server).answer([image()], ["a"])
    assert len(server.requests) == 4
    server.shutdown()
    server.server_close()
    with pytest.raises(JudgeError, match="gave no answer in 4 tries, last ConnectionRefusedError"):
        judge_at(server).answer([image()], ["a"])


def test_requests_under_way_are_bounded(server):
    def behave(count, question):
        # Three must be there at once, or it never ends.
        together.wait(60)
        return question

    together = threading.Barrier(3)
    server.behave = behave
    questions = [str(number) for number in range(12)]
    assert judge_at(server, max_in_flight=3).answer([image()] * 12, questions) == questions
    assert server.most_under_way == 3


def test_a_run_that_ends_goes_on_and_a_finished_one_asks_nothing(server, tmp_path):
    is_down = True
    server.behave = lambda count, question: (503, "down") if is_down and int(question) > 4 else f"no, {question}"
    questions = [str(number) for number in range(9)]
    with pytest.raises(JudgeError), KeptAnswers(judge_at(server, max_in_flight=2), tmp_path / "a.jsonl") as kept:
        kept.answer([image()] * 9, questions)
    is_down, before = False, len(server.requests)
    for asked in (4, 0):
        with KeptAnswers(judge_at(server), tmp_path / "a.jsonl") as kept:
            assert kept.answer([image()] * 9, questions) == [f"no, {question}" for question in questions]
            assert kept.num_asked == asked
    assert len(server.requests) == before + 4


def test_questions_that_end_in_an_error_lose_no_answer(server, tmp_path):
    asked = threading.Barrier(2)
    ended = threading.Event()

    def behave(count, question):
        asked.wait(60)
        ended.wait(60)
        return question

    def questions():
        yield image(), "a"
        yield image(), "b"
        ended.set()
        raise DataError("no third image")

    server.behave = behave
    with (
        pytest.raises(DataError, match="no third image"),
        KeptAnswers(judge_at(server, max_in_flight=3), tmp_path / "a.jsonl") as kept,
    ):
        list(kept.stream(questions()))
    assert kept.num_asked == 2
    with KeptAnswers(judge_at(server), tmp_path / "a.jsonl") as kept:
        assert kept.answer([image()] * 2, ["a", "b"]) == ["a", "b"]
    assert len(server.requests) == 2


def test_a_refused_key_is_an_error_without_the_key(server, monkeypatch, tmp_path, capfd, caplog):
    path = tmp_path / "a.jsonl"
    refusals = {
        "401": (401, f"Incorrect API key provided: {KEY[:8]}"),
        "403": (403, KEY),
        "400": (400, f"bad header Bearer {KEY} for model"),
        "200": (200, "x" * 280 + KEY),
    }
    # A refused request is followed by one about a plain picture.
    server.behave = lambda count, question: refusals.get(question, refusals["400"])
    messages = []
    for question in refusals:
        with (
            pytest.raises(JudgeError) as error,
            KeptAnswers(judge_at(server, monkeypatch, patience=Patience(60, 1)), path) as kept,
        ):
            kept.answer([image()], [question])
        messages.append(f"{error.value} {error.value.__cause__}")
    assert "refuses the key (401) of the variable MY_KEY" in messages[0]
    assert "refuses the request, 400" in messages[2] and "model" in messages[2]
    assert "no chat completion" in messages[3]
    seen = " ".join([*messages, caplog.text, path.read_text(encoding="utf-8"), *capfd.readouterr()])
    assert KEY[:8] not in seen
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_refused_picture_counts_as_unclear(server, tmp_path, caplog, status):
    server.behave = lambda count, question: (status, "content filter: no") if question == "2" else "yes"
    questions = [str(number) for number in range(10)]
    expected = ["(refused)" if question == "2" else "yes" for question in questions]
    assert yes_or_no("(refused)") is None
    for asked in (10, 0):
        with KeptAnswers(judge_at(server), tmp_path / "a.jsonl") as kept:
            assert kept.answer([image()] * 10, questions) == expected
            assert kept.num_asked == asked
    # Ten questions, and one about a plain picture.
    assert len(server.requests) == 11
    assert f"refuses the request, {status}" in caplog.text and "counts as refused" in caplog.text


def test_an_address_that_is_wrong_is_an_error_even_after_answers(server):
    server.behave = lambda count, question: (404, "no such model") if question == "2" else "yes"
    with pytest.raises(JudgeError, match="refuses the request, 404 .*; check the address and the model's name"):
        judge_at(server).answer([image()] * 3, ["1", "2", "3"])


def test_the_key_does_not_follow_a_redirection(server, monkeypatch):
    server.behave = lambda count, question: (302, "", ("Location", f"{server.url}/elsewhere"))
    with pytest.raises(JudgeError, match="302 .*name the address that it leads to"):
        judge_at(server, monkeypatch).answer([image()], ["a"])
    assert len(server.requests) == 1


def test_a_model_that_declines_says_neither(server):
    message = json.dumps({"choices": [{"message": {"content": None, "refusal": "I will not."}}]})
    server.behave = lambda count, question: (200, message)
    assert judge_at(server).answer([image()], ["a"]) == ["I will not."]


@pytest.mark.parametrize(
    ("url", "key", "match"),
    [
        ("localhost:8000", None, "is no address of an endpoint"),
        ("ftp://host/v1", None, "is no address of an endpoint"),
        ("https://me:secret@host/v1", None, "holds a user or password.*environment variable"),
        ("https://host/v1?api_key=secret", None, "holds a value of 'api_key'"),
        ("https://host/v1", "", "MY_KEY is not set or empty"),
        ("https://host/v1", "sec\nret", "MY_KEY holds signs that no key has"),
    ],
)
def test_bad_addresses_and_keys(monkeypatch, url, key, match):
    monkeypatch.setenv("MY_KEY", key or "")
    with pytest.raises(ConfigError, match=match) as error:
        EndpointJudge(url, "a-model", None if key is None else "MY_KEY")
    assert "secret" not in str(error.value) and "sec\nret" not in str(error.value)
