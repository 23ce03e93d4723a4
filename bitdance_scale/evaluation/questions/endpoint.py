"""A judge behind an OpenAI-compatible endpoint: `POST {base_url}/chat/completions` with the image as a data URL.

The key comes from an environment variable that the user names. It is in the header of requests and nowhere else: no
message repeats it, nor what a server that refuses it says.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import logging
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from bitdance_scale.credentials import HIDDEN, find_credentials
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.evaluation.questions.judge import Asked, Judge, JudgeError, Remembered

logger = logging.getLogger(__name__)

_MAX_WAIT_S = 60.0
_MAX_ANSWER_BYTES = 1 << 24
_SHOWN_CHARACTERS = 300
# What a server says where the same request may succeed later.
_PASSING = frozenset({408, 409, 425, 429})
# What it says of a picture or question that it does not take, and of requests that are wrong altogether.
_OF_CONTENT = frozenset({400, 413, 422})
_REFUSED = "(refused)"
_PLAIN = np.full((64, 64, 3), 128, dtype=np.uint8)
_PLAIN_QUESTION = "Is this picture grey? Answer with one word, yes or no."


@dataclass(frozen=True)
class Patience:
    """How long an endpoint is tried.

    Attributes:
        timeout_s: seconds without a byte after which a request has failed.
        num_tries: requests per question. Those that meet 408, 409, 425, 429, 5xx, a broken connection, a timeout or an
            answer that cannot be read are repeated.
        first_wait_s: seconds before the second try; twice as many before each further one, and at most 60. Longer
            where the server says so in `Retry-After`.
    """

    timeout_s: float = 120.0
    num_tries: int = 8
    first_wait_s: float = 1.0


class _ContentRefusal(JudgeError):
    """The endpoint refuses a request with a status that may be due to its picture or question."""


class EndpointJudge(Judge):
    """A model that is asked through HTTP, at temperature 0.

    An endpoint may refuse a single picture, by a filter of content or by size. If it still answers a question about a
    plain grey one, the refusal is the answer, "(refused)"; otherwise it is an error.

    Args:
        base_url: address up to the version, such as "https://api.openai.com/v1" or "http://localhost:8000/v1".
        model: the model's name at that address.
        key_variable: environment variable that holds the key; None where the endpoint wants none.
        max_in_flight: requests at a time.
        patience: how long it is tried.
        system: a system message; None for none.

    Raises:
        ConfigError: the address is none, holds credentials, or the variable is not set.
    """

    follows_instructions = True

    def __init__(
        self,
        base_url: str,
        model: str,
        key_variable: str | None = None,
        *,
        max_in_flight: int = 8,
        patience: Patience | None = None,
        system: str | None = None,
    ) -> None:
        self.model = model
        self.protocol = "chat completions at temperature 0, version 1" + ("" if system is None else f": {system}")
        self._url = _completions_url(base_url)
        self._key, self._key_variable = _read_key(key_variable), key_variable
        self._max_in_flight = max_in_flight
        self._patience = Patience() if patience is None else patience
        self._system = system
        self._data_url = Remembered(_data_url)
        self._send = urllib.request.build_opener(_NoRedirect).open

    def stream(self, asked: Iterable[Asked]) -> Iterator[tuple[int, str]]:
        """As `Judge.stream`; at most `max_in_flight` questions are under way.

        After an error, of the endpoint or of what gives the questions, nothing more is asked, but the answers that are
        under way are waited for.
        """
        questions = enumerate(asked)
        under_way: dict[concurrent.futures.Future[str], int] = {}
        error: BaseException | None = None
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(self._max_in_flight) as pool:
            try:
                while True:
                    while error is None and len(under_way) < self._max_in_flight:
                        try:
                            found = next(questions, None)
                        except BitDanceError as raised:
                            error = raised
                            stop.set()
                            break
                        if found is None:
                            break
                        place, (image, question) = found
                        body = self._request_body(self._data_url(image), question)
                        under_way[pool.submit(self._ask, body, stop)] = place
                    if not under_way:
                        break
                    done, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        place = under_way.pop(future)
                        if future.exception() is None:
                            yield place, future.result()
                        else:
                            error = error or future.exception()
                            stop.set()
            finally:
                stop.set()
        if error is not None:
            raise error

    def _request_body(self, data_url: str, question: str) -> bytes:
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": data_url}}]
        messages: list[dict[str, Any]] = [] if self._system is None else [{"role": "system", "content": self._system}]
        messages.append({"role": "user", "content": content})
        return json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()

    def _ask(self, body: bytes, stop: threading.Event) -> str:
        """The text of one answer, or that this picture or question is refused.

        Raises:
            JudgeError: the endpoint refuses all, or the last try failed.
        """
        try:
            return self._try(body, stop)
        except _ContentRefusal as refusal:
            try:
                self._try(self._request_body(_data_url(_PLAIN), _PLAIN_QUESTION), stop)
            except _ContentRefusal:
                raise refusal from None
            logger.warning("%s; it answers a question about a plain picture, so this one counts as refused", refusal)
            return _REFUSED

    def _try(self, body: bytes, stop: threading.Event) -> str:
        """The text of one answer, after as many tries as it takes; none follows once `stop` is set.

        Raises:
            JudgeError: the endpoint refuses, or the last try failed.
        """
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        wait_s = self._patience.first_wait_s
        for try_number in range(1, self._patience.num_tries + 1):
            longer_s = 0.0
            try:
                with self._send(request, timeout=self._patience.timeout_s) as response:
                    return _text_of(response.read(_MAX_ANSWER_BYTES))
            except urllib.error.HTTPError as error:
                with error:
                    failure, longer_s = self._failure(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # No connection, a broken or silent one, or an answer that is no completion.
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                failure = f"{type(reason).__name__}: {reason}"
            # Not all threads at the same moment.
            pause_s = min(_MAX_WAIT_S, max(longer_s, wait_s * random.uniform(0.5, 1.0)))
            if try_number == self._patience.num_tries or stop.wait(pause_s):
                break
            wait_s *= 2
        raise JudgeError(
            f"{self._url}: gave no answer in {try_number} tries, last {self._hidden(failure)}. Start again when the "
            "endpoint is there; answers that were kept are not asked for again"
        )

    def _failure(self, error: urllib.error.HTTPError) -> tuple[str, float]:
        """What a status says that may pass, and how many seconds the server asks to wait.

        Raises:
            JudgeError: it is one that does not pass.
        """
        if error.code in (401, 403):
            where = "and none was sent" if self._key is None else f"of the variable {self._key_variable}"
            raise JudgeError(
                f"{self._url}: refuses the key ({error.code}) {where}; name a variable that holds a key for "
                f"this endpoint and the model {self.model}"
            )
        try:
            said = error.read(_MAX_ANSWER_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        described = f"{error.code} {error.reason}: {' '.join(said.split())}"
        if error.code not in _PASSING and error.code < 500:
            fix = "name the address that it leads to" if error.code < 400 else "check the address and the model's name"
            kind = _ContentRefusal if error.code in _OF_CONTENT else JudgeError
            raise kind(f"{self._url}: refuses the request, {self._hidden(described)}; {fix}")
        try:
            return described, float(error.headers.get("Retry-After", 0))
        except ValueError:
            return described, 0.0

    def _hidden(self, text: str) -> str:
        """A text of the server without the key, should it repeat it."""
        text = text if self._key is None else text.replace(self._key, HIDDEN)
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirections are errors: urllib would send the key to wherever they lead."""

    def redirect_request(self, *details: Any) -> None:
        """Follows none."""


def _completions_url(base_url: str) -> str:
    found = find_credentials(base_url)
    if found is not None:
        raise ConfigError(f"{base_url}: holds {found}; put the key into an environment variable and name the variable")
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{base_url!r}: is no address of an endpoint, such as http://localhost:8000/v1")
    return f"{base_url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} is not set or empty; it must hold the endpoint's key")
    # http.client would repeat it in its error.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the environment variable {variable} holds signs that no key has, such as blanks or line ends"
        )
    return key


def _data_url(image: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(content, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _text_of(body: bytes) -> str:
    """The answer in the body of a completion; empty where the model declined.

    Raises:
        ValueError: it is none.
    """
    try:
        message = json.loads(body)["choices"][0]["message"]
        text = message["content"]
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"no chat completion: {body.decode('utf-8', 'replace')}") from None
    if text is None:
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise ValueError(f"no chat completion: content of type {type(text).__name__}")
    return text
