"""An OpenAI-compatible endpoint of the standard library that does what a test tells it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Counts requests; `behave(request number of this question, question)` says what happens to one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave: Callable[[int, str], object] = lambda count, question: "yes"
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def handle_error(self, *details: object) -> None:
        """Clients that have gone away are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"][0]["text"]
        with self.server.lock:
            self.server.requests.append({"path": self.path, **body})
            self.server.headers.append(dict(self.headers))
            count = sum(other["messages"][-1]["content"][0]["text"] == question for other in self.server.requests)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            does = self.server.behave(count, question)
        finally:
            with self.server.lock:
                self.server.under_way -= 1
        if isinstance(does, tuple):
            code, text, *headers = does
            self.reply(code, text.encode(), dict(headers))
        elif isinstance(does, str):
            self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": does}}]}).encode())
        # None: the connection is closed without a word.

    def reply(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *details: object) -> None:
        """Is silent."""


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A server in a thread of its own."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
