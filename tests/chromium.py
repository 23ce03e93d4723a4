"""A headless Chromium that a test drives over its DevTools protocol, through a pipe.

The protocol: https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""Of this machine; None: there is none."""
TIMEOUT_S = 60.0
_OPTIONS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--force-color-profile=srgb", "--remote-debugging-pipe"),
]


class Page:
    """A tab.

    Attributes:
        requested: addresses of everything that the page has asked for, data addresses left out.
        complaints: errors that its scripts or the console have told of.
    """

    def __init__(self, process: subprocess.Popen[bytes], read_fd: int, write_fd: int) -> None:
        self._process, self._read_fd, self._write_fd = process, read_fd, write_fd
        self._received, self._number, self._session = b"", 0, ""
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._attach()

    def close(self) -> None:
        """Closes the tab and opens an empty one."""
        self._call("Target.closeTarget", targetId=self._target)
        self._session = ""
        self._attach()

    def _attach(self) -> None:
        self._target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def resize(self, width_px: int, height_px: int) -> None:
        """Gives the window a size."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=height_px, deviceScaleFactor=1, mobile=False
        )

    def open(self, address: str) -> None:
        """Begins to load a page."""
        self._call("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = TIMEOUT_S) -> Any:
        """The value of an expression as soon as it is true."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := self.evaluate(script)):
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{script}: not within {timeout_s:g} s; the page says: {self.text()}")
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """The words of the page."""
        return str(self.evaluate("document.body.innerText"))

    def click(self, selector: str) -> None:
        """Clicks on the middle of the first element that the selector matches, as a mouse does."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Replaces the text of a field, as a keyboard does."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select(); }})()"
        )
        self._call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Presses a key."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def save_downloads(self, folder: Path) -> None:
        """Lets downloads go into a folder."""
        session, self._session = self._session, ""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self._session = session

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        """Writes what is seen, or all of the page, as a PNG."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if not address.startswith(("data:", "blob:", "about:")):
                self.requested.append(address)
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def _next(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read_fd], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, "Chromium does not answer"
            part = os.read(self._read_fd, 1 << 20)
            assert part, f"Chromium has ended with code {self._process.wait()}"
            self._received += part
        message, self._received = self._received.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own, for as long as the block runs.

    Args:
        profile: an empty folder for what the browser keeps.
    """
    assert CHROMIUM is not None
    its_read, our_write = os.pipe()
    our_read, its_write = os.pipe()
    # Chromium reads from descriptor 3 and writes to descriptor 4.
    command = f'exec "$@" 3<&{its_read} 4>&{its_write}'
    process = subprocess.Popen(
        ["bash", "-c", command, "chromium", CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(its_read, its_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_read)
    os.close(its_write)
    try:
        yield Page(process, our_read, our_write)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_write)
        os.close(our_read)
