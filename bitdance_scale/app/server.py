"""Serves the page to browsers, and nothing else.

Gradio's own ways to files, to other servers and to uploads are closed, and what a browser may fetch for the page is
this server's alone.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from bitdance_scale.app.desk import Desk
from bitdance_scale.app.fragments import PICTURES_PATH
from bitdance_scale.app.history import PictureFolder
from bitdance_scale.app.run_watch import RunWatch
from bitdance_scale.app.settings import Fields
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import StopRequest

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CLOSED = (
    *("file=", "file/", "proxy=", "upload", "runs", "run-history"),
    *("custom_component", "dev/", "deep_link", "monitoring"),
)
"""Parts of gradio's interface that the page does not use: they serve files, keep files, or fetch from elsewhere."""
_PREFIXES = ("/gradio_api/", "/")
_HEADERS = {
    # Gradio's scripts make functions out of text, and its components have styles of their own.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_STYLE = Path(__file__).with_name("style.css")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """Lets through what the page needs; an ASGI application before another.

    Args:
        app: the other.
        hosts: names under which browsers may call the server; empty: any. A page of somebody else whose name has
            become this machine's address calls it by that name.
    """

    def __init__(self, app: AsgiApp, hosts: tuple[str, ...]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await send({"type": "http.response.start", "status": refusal, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> int | None:
        """The status of a request that is not let through; None: it is."""
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        host = named.rsplit(":", 1)[0] if not named.endswith("]") else named
        if self._hosts and host.strip("[]") not in self._hosts:
            return 403
        path = scope["path"]
        is_closed = any(path.startswith(prefix + part) for prefix in _PREFIXES for part in _CLOSED)
        return 404 if is_closed else None


def check_gradio() -> None:
    """Refuses to go on without gradio.

    Raises:
        ConfigError: it is not installed.
    """
    # Before it is imported: it asks a server of its makers for its newest version otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"bitdance app: the page needs gradio ({error}); install it with `pip install 'bitdance_scale[app]'`"
        ) from error


def bind(host: str, port: int) -> socket.socket:
    """Takes a port of this machine.

    Args:
        host: an address or name of this machine; 0.0.0.0 for all of its addresses.
        port: 0: any that is free.

    Raises:
        ConfigError: it is taken, or there is no such address here.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}); name an address of this "
            "machine and a free port, or --port 0 for any"
        ) from error
    return bound


def serve(
    bound: socket.socket,
    host: str,
    folder: PictureFolder,
    desk: Desk | None,
    start: Fields | None,
    watch: RunWatch | None,
) -> None:
    """Serves the page until the process is asked to end.

    Args:
        bound: where to listen.
        host: as the user named it.
        folder: of pictures.
        desk: of the tab in which one draws; None: without it.
        start: what stands in its fields at first.
        watch: of the tab in which one watches a run; None: without it.
    """
    # Whatever gradio keeps, it keeps in this folder, too.
    os.environ["GRADIO_TEMP_DIR"] = str(folder.path / "gradio")
    import fastapi
    import gradio as gr
    import uvicorn
    from starlette.staticfiles import StaticFiles

    from bitdance_scale.app.page import make_page

    app = fastapi.FastAPI(openapi_url=None)
    app.mount(f"/{PICTURES_PATH}", StaticFiles(directory=folder.path))
    page = make_page(desk, start, watch)
    app = gr.mount_gradio_app(
        app,
        page.blocks,
        path="",
        theme=page.theme,
        css=_STYLE.read_text(encoding="utf-8"),
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size="1kb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
    )
    hosts = (*LOOPBACK, host) if host in LOOPBACK else ()
    port = bound.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(Gate(app, hosts), log_level="warning", timeout_graceful_shutdown=2))
    print(f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends it", flush=True)
    if not hosts:
        print("note: everybody who can reach this machine can draw; there is no password", file=sys.stderr)
    # The server hands on the signals that it has ended for; they are no errors.
    with StopRequest():
        server.run(sockets=[bound])
