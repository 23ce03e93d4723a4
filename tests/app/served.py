"""`bitdance app` in a process of its own, as somebody starts it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
APART = Path(sys.prefix) / "app"
"""Where `make setup` puts gradio."""
HAS_GRADIO = importlib.util.find_spec("gradio") is not None or (APART / "gradio").is_dir()
START_S = 120.0


@dataclass(frozen=True)
class Served:
    """A page that is served.

    Attributes:
        address: of the page.
        process: of the command.
        temporary: folder in which the command puts its temporary ones.
    """

    address: str
    process: subprocess.Popen[str]
    temporary: Path

    def end(self) -> int:
        """Ends the command as Ctrl-C does; returns its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@contextlib.contextmanager
def served(*arguments: object) -> Iterator[Served]:
    """The command with these arguments, on a free port, until the block ends."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = [str(ROOT), str(APART), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-m", "bitdance_scale.cli", "app", *map(str, arguments), "--port=0"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": temporary, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        try:
            yield Served(_address(process), process, Path(temporary))
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    """The address that the command says, once it does."""
    said, deadline_s = "", time.monotonic() + START_S
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        found = re.search(r"open (http://\S+) in a browser", line)
        if found is not None:
            return found[1]
        assert time.monotonic() < deadline_s, said
    raise AssertionError(f"the command has ended with code {process.wait()}: {said}")
