"""Faults that happen to a rank at a chosen moment, and what a whole run leaves to compare."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Fault:
    """Something that happens to a rank.

    Attributes:
        what: a name of `ACTIONS`.
        rank: to which; -1: to all.
        phase: in which phase of a step (`phases.Phase`); empty: not there.
        step: in the step after so many.
        save_action: before which step of the protocol of a save, or `write`, in the middle of a tensor file.
        show_step: when the metrics of this step are shown, which the first rank does alone.
        num_save: in which save since the start, from 1.
        after_s: at a random moment up to so many seconds after the first step; 0: not so.
        seed: of that moment.
    """

    what: str
    rank: int = 1
    phase: str = ""
    step: int = -1
    save_action: str = ""
    show_step: int = -1
    num_save: int = 1
    after_s: float = 0.0
    seed: int = 0


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_everything() -> None:
    # Unlike CDLL, this does not let other Python threads run.
    ctypes.PyDLL(None).sleep(3600)


def _fail() -> None:
    raise RuntimeError("an injected fault")


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "stop": _stop,
    "sleep": lambda: time.sleep(3600),
    "hold the interpreter": _hold_everything,
    "fail": _fail,
    "exit": lambda: os._exit(1),
    "ask to stop": _ask_to_stop,
}


@contextlib.contextmanager
def injected(fault: Fault | None, rank: int) -> Iterator[None]:
    """The block runs on a rank to which the fault happens, once."""
    if fault is None or fault.rank not in (rank, -1):
        yield
        return
    from bitdance_scale.checkpoint import checkpoint_folder, tensor_storage
    from bitdance_scale.phases import POSITION, Phase, listening

    act, happened = ACTIONS[fault.what], threading.Event()

    def once() -> None:
        if not happened.is_set():
            happened.set()
            act()

    @contextlib.contextmanager
    def listen(phase: Phase) -> Iterator[None]:
        if fault.after_s and phase is Phase.FORWARD and not timer.is_alive():
            timer.start()
        if phase == fault.phase and POSITION.step == fault.step:
            once()
        yield

    timer = threading.Timer(random.Random(fault.seed).uniform(0.0, fault.after_s), once)
    timer.daemon = True
    patched = contextlib.ExitStack()
    if fault.save_action == "write":
        patched.enter_context(_write_halfway(tensor_storage, fault.num_save, once))
    elif fault.save_action:
        patched.enter_context(_before_action(checkpoint_folder, fault, once))
    if fault.show_step >= 0:
        patched.enter_context(_showing(fault.show_step, once))
    with patched, listening(listen):
        yield


@contextlib.contextmanager
def _write_halfway(tensor_storage, num_save: int, act: Callable[[], None]) -> Iterator[None]:
    """Acts when the second half of a save's first tensor file would be written."""
    write_data, num_saves = tensor_storage.SafetensorsWriter.write_data, 0
    tensor_bytes = tensor_storage.tensor_bytes

    def counted(self, *args):
        nonlocal num_saves
        num_saves += 1
        return write_data(self, *args)

    def bytes_or_act(values):
        if num_saves == num_save:
            act()
        return tensor_bytes(values)

    tensor_storage.SafetensorsWriter.write_data, tensor_storage.tensor_bytes = counted, bytes_or_act
    try:
        yield
    finally:
        tensor_storage.SafetensorsWriter.write_data, tensor_storage.tensor_bytes = write_data, tensor_bytes


@contextlib.contextmanager
def _showing(step: int, act: Callable[[], None]) -> Iterator[None]:
    from bitdance_scale.train.run_sinks import RunSinks

    write_step = RunSinks.write_step

    def acting(self, record, *args, **kwargs):
        write_step(self, record, *args, **kwargs)
        if record.step == step:
            act()

    RunSinks.write_step = acting
    try:
        yield
    finally:
        RunSinks.write_step = write_step


@contextlib.contextmanager
def _before_action(checkpoint_folder, fault: Fault, act: Callable[[], None]) -> Iterator[None]:
    init, num_saves = checkpoint_folder.CheckpointFolder.__init__, 0

    def before(action: str) -> None:
        nonlocal num_saves
        num_saves += action == "create"
        if action == fault.save_action and num_saves == fault.num_save:
            act()

    def patched(self, *args, **kwargs):
        init(self, *args, **(kwargs | {"before": before}))

    checkpoint_folder.CheckpointFolder.__init__ = patched
    try:
        yield
    finally:
        checkpoint_folder.CheckpointFolder.__init__ = init


def train_rank(rank: int, root: str, overrides: list[str], fault: Fault | None) -> int:
    """One rank of a run of the demo; returns its exit code."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.train.process import run_process
    from bitdance_scale.train.text_to_image import run_text_to_image

    config = load_config("demo", [*overrides, f"run.root='{root}'"])
    with injected(fault, rank):
        return run_process(lambda: run_text_to_image(config))


def fingerprint(run_folder: Path) -> dict[str, object]:
    """What must be equal, bit by bit, in two runs: the digests of the last checkpoint's files, and the metrics."""
    newest = run_folder / "checkpoints" / (run_folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    index = json.loads((newest / "tensors" / "index.json").read_text(encoding="utf-8"))
    lines = [(line.step, line.loss, line.grad_norm, line.images) for line in read_metrics(run_folder / METRICS_FILE)]
    return {"checkpoint": newest.name, "files": index["files"], "metrics": lines}
