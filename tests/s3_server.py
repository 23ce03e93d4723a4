"""A real S3 server in a process of its own, and a proxy before it that breaks requests on purpose."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "hush-hush", "AWS_DEFAULT_REGION": "us-east-1"}
FAULTS = ("refused", "throttled", "reset", "cut", "other_range", "slow_start")
WRITE_FAULTS = ("refused", "throttled", "timed_out", "damaged", "reset", "lost", "slow_start")
_ANSWERS = {
    "refused": (503, ""),
    "denied": (403, ""),
    "throttled": (400, "Throttling"),
    "timed_out": (400, "RequestTimeout"),
    "damaged": (400, "BadDigest"),
}
"""Kind of a fault that is an answer -> its status, and the code of its error if it has one."""
_START_TIMEOUT_S = 60
_SLOW_S = 0.2


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Runs moto's server; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | CREDENTIALS
    )
    try:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline_s, "moto's server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def bucket_server(bucket: str) -> Iterator[str]:
    """A server with an empty bucket; this process has its credentials and nothing of this machine's configuration."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as url:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=bucket)
        yield url


class FaultInjector:
    """Forwards requests to a server and breaks a share of those for objects.

    Args:
        target: URL of the server.
        share: of the reads of objects that break, by each of `kinds` alike.
        kinds: of `FAULTS`; `denied` answers 403 for good.
        seed: of what breaks.

    Attributes:
        url: where it listens.
        counts: how often each kind was made.
        share, kinds: may be changed while it runs.
        write_share, write_kinds: the same of the writes, of `WRITE_FAULTS`; after `lost` the server has got the
            request, and the client no answer.
        requests: (method, path with query, bytes of the body) of all that came.
        before: called before a request is forwarded, with its method and path; tests wait or count there.
    """

    def __init__(self, target: str, share: float = 0.0, kinds: tuple[str, ...] = FAULTS, seed: int = 0) -> None:
        self.share, self.kinds = share, kinds
        self.write_share, self.write_kinds = 0.0, WRITE_FAULTS
        self.requests: list[tuple[str, str, int]] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.counts: Counter[str] = Counter()
        self._address = urlsplit(target).netloc
        self._random = random.Random(seed)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultInjector:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, share: float, kinds: tuple[str, ...]) -> str | None:
        if self._random.random() >= share:
            return None
        kind = self._random.choice(kinds)
        self.counts[kind] += 1
        return kind

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        injector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                share = injector.share if "Range" in self.headers else 0.0
                injector._forward(self, injector._fault(share, injector.kinds) if share else None)

            def do_PUT(self) -> None:
                injector._forward(self, injector._fault(injector.write_share, injector.write_kinds))

            do_POST = do_PUT

            def do_DELETE(self) -> None:
                injector._forward(self, None)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _forward(self, request: BaseHTTPRequestHandler, fault: str | None) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.requests.append((request.command, request.path, len(body)))
        self.before(request.command, request.path)
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            answer = f"<Error><Code>{code}</Code><Message>try again</Message></Error>".encode() if code else b""
            request.send_response(status)
            request.send_header("Content-Length", str(len(answer)))
            request.end_headers()
            request.wfile.write(answer)
            return
        if fault == "reset":
            _reset(request)
            return
        if fault == "slow_start":
            time.sleep(_SLOW_S)
        headers = dict(request.headers)
        if fault == "other_range":
            headers["Range"] = "bytes=0-99"
        connection = http.client.HTTPConnection(self._address)
        headers.pop("Expect", None)
        connection.request(request.command, request.path, body=body or None, headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if fault == "lost":
            _reset(request)
            return
        request.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault == "cut":
            request.wfile.write(body[: (len(body) + 1) // 2])
            request.close_connection = True
            return
        request.wfile.write(body)


def _reset(request: BaseHTTPRequestHandler) -> None:
    """Ends the connection without a farewell."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()
    request.close_connection = True
