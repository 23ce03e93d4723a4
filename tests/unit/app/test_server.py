"""The gate in front of gradio, and the port."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from bitdance_scale.app.server import LOOPBACK, Gate, bind
from bitdance_scale.errors import ConfigError


async def page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"page"})


def ask(path: str, host: str = "127.0.0.1:7860", hosts: tuple[str, ...] = LOOPBACK) -> tuple[int, dict[bytes, bytes]]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(Gate(page, hosts)(scope, None, send))
    assert len(sent) == 2 and sent[1]["body"] == (b"page" if sent[0]["status"] == 200 else b"")
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", "/gradio_api/queue/join", "/pictures/a.png"])
def test_the_page_is_served_and_may_fetch_from_here_alone(path):
    status, headers = ask(path)
    assert status == 200 and headers[b"content-type"] == b"text/html"
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=http://example.com", "/file=x", "/gradio_api/file/x"),
        *("/gradio_api/proxy=http://example.com", "/gradio_api/upload", "/gradio_api/upload_progress", "/proxy=x"),
        *("/gradio_api/runs", "/gradio_api/run-history/connect", "/gradio_api/custom_component/1/a/b/c"),
    ],
)
def test_ways_to_files_and_to_other_servers_are_closed(path):
    assert ask(path)[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost:7860", 200), ("127.0.0.1", 200), ("[::1]:7860", 200), ("[::1]", 200)),
        *(("evil.example:7860", 403), ("", 403), ("127.0.0.1.evil.example", 403)),
    ],
)
def test_on_loopback_the_server_answers_to_its_own_names(host, status):
    assert ask("/", host)[0] == status
    assert ask("/", host, ())[0] == 200


def test_a_port_that_is_taken_or_not_here_is_refused():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--host 127.0.0.1 --port {port}: cannot be listened on .*--port 0"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host 192.0.2.1 --port 0: cannot be listened on"):
        bind("192.0.2.1", 0)
    with bind("localhost", 0) as bound:
        assert bound.family in (socket.AF_INET, socket.AF_INET6)
