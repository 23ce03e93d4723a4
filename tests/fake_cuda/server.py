"""A process that has imported the engines once, and forks itself for every call: a walk then costs no imports.

    with ForkServer("cuda") as server: server.call("package.module:function", argument)

Process groups are global to a process, so every rank that is walked needs one of its own. On the server "cuda" the fake
device is preloaded (`device.py`), and functions get a `Recorder` first; on "cpu" nothing is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_cuda.device import PinnedMemory, cuda_device, environment

_MODULES = {
    "cuda": ("tests.fake_cuda.walk",),
    "cpu": ("tests.fake_cuda.memory",),
}
_POLL_S = 0.05
_NUM_FRAMES = 24
_STARTING = threading.Lock()


class ForkServer:
    """Calls functions, each in a process of its own; several threads may call at once.

    Args:
        kind: "cuda" or "cpu".
    """

    def __init__(self, kind: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bitdance_walks_")
        self._lock, self._num_calls = threading.Lock(), 0
        self._log = (Path(self._folder.name) / "server.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, kind],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            **environment(has_device=kind == "cuda"),
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, *arguments: object, timeout_s: float = 600.0) -> Any:
        """What a function of the server returns for arguments that can be pickled.

        Args:
            function: as `module:name`.
            arguments: of it.
            timeout_s: seconds, from when it starts.

        Raises:
            RuntimeError: it fails, or does not end in time; with its trace and the end of what it printed.
        """
        with self._lock:
            self._num_calls += 1
            answer = Path(self._folder.name) / f"{self._num_calls}.answer"
            message = pickle.dumps(_Call(function, arguments, str(answer), timeout_s)).hex()
            assert self._process.stdin is not None, "a pipe"
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{message}\n".encode())
                self._process.stdin.flush()
        while not answer.exists():
            if self._process.poll() is not None:
                self._log.seek(0)
                raise RuntimeError(f"the server ended:\n{self._log.read()[-6000:].decode(errors='replace')}")
            time.sleep(_POLL_S)
        is_well, value = pickle.loads(answer.read_bytes())
        answer.unlink()
        if not is_well:
            raise RuntimeError(f"{function}: {value}")
        return value

    def close(self) -> None:
        """Ends the server and what it still runs."""
        assert self._process.stdin is not None, "a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()


@dataclass(frozen=True)
class _Call:
    function: str
    arguments: tuple[object, ...]
    answer: str
    timeout_s: float


def _serve(kind: str) -> None:
    """Runs what is asked for on standard input until that ends."""
    with contextlib.ExitStack() as replaced:
        first: tuple[object, ...] = ()
        if kind == "cuda":
            from tests.fake_cuda.recording import Recorder

            pinned = PinnedMemory()
            recorder = Recorder(pinned)
            replaced.enter_context(cuda_device(recorder.wait, pinned))
            first = (recorder,)
        for module in _MODULES[kind]:
            importlib.import_module(module).import_engines()
        # Engines collect garbage again and again: what is imported is left out.
        gc.collect()
        gc.freeze()
        num_threads = len(os.listdir("/proc/self/task"))
        assert num_threads == 1, f"{num_threads} threads, of which a fork would lose all but one"
        _accept(first)


def _accept(first: tuple[object, ...]) -> None:
    running: dict[int, tuple[_Call, float]] = {}
    buffer, is_open = b"", True
    while is_open:
        if select.select([0], [], [], _POLL_S)[0]:
            read = os.read(0, 1 << 16)
            is_open, buffer = bool(read), buffer + read
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            call = pickle.loads(bytes.fromhex(line.decode()))
            child = os.fork()
            if not child:
                _run(call, first)
            running[child] = (call, time.monotonic() + call.timeout_s)
        for child, (call, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                if not Path(call.answer).exists():
                    how = f"ended with status {status} within {call.timeout_s:.0f} s"
                    _answer(call, (False, f"{how}; it printed\n{_printed(call)}"))
    for child in running:
        os.kill(child, signal.SIGKILL)


def _run(call: _Call, first: tuple[object, ...]) -> None:
    """In the child: runs the call, answers and ends."""
    output = os.open(f"{call.answer}.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(0)
    try:
        module, _, name = call.function.partition(":")
        result = (True, getattr(importlib.import_module(module), name)(*first, *call.arguments))
    except BaseException as error:  # noqa: BLE001  # Whatever it is, the caller must hear of it.
        sys.stderr.flush()
        frames = "".join(traceback.format_tb(error.__traceback__)[-_NUM_FRAMES:])
        first_line = f"{type(error).__name__}: {error}"[:1000]
        result = (False, f"{first_line}\n{frames}\n{_printed(call)}")
    _answer(call, result)
    # Threads of autograd and of engines must not keep the process.
    os._exit(0)


def _answer(call: _Call, result: tuple[bool, object]) -> None:
    written = Path(f"{call.answer}.part")
    written.write_bytes(pickle.dumps(result))
    written.replace(call.answer)


def _printed(call: _Call) -> str:
    return Path(f"{call.answer}.log").read_bytes()[-2000:].decode(errors="replace")


def server(kind: str) -> ForkServer:
    """The server of this process, which ends with it."""
    # Several threads may want the first one at once.
    with _STARTING:
        return _started(kind)


@functools.cache
def _started(kind: str) -> ForkServer:
    import atexit

    started = ForkServer(kind)
    atexit.register(started.close)
    return started


def in_parallel(calls: list[Callable[[], Any]], at_once: int = 2) -> list[Any]:
    """The results of calls of which a few run at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda call: call(), calls))


if __name__ == "__main__":
    _serve(sys.argv[1])
