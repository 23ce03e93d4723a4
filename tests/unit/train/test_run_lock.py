"""One process per run folder: who is refused, and from whom the folder is taken over."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bitdance_scale.errors import ConfigError, TrainingError
from bitdance_scale.train.run_lock import LOCK_FILE, Holder, RunLock

STALE_S = 1.0


def held_by(folder: Path, **changes: object) -> Path:
    """A lock as another process leaves it."""
    path = folder / LOCK_FILE
    holder = dataclasses.replace(Holder.this_process(), token="another", **changes)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return path


def test_a_second_start_says_who_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunLock(tmp_path):
        named = rf"another process trains in this run folder: process {os.getpid()} on .*, Slurm job 4711, since 20"
        with pytest.raises(ConfigError, match=named):
            RunLock(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over == ""
    assert not list(tmp_path.iterdir()), "nothing stays"


def test_a_killed_holder_on_this_machine_is_replaced_at_once(tmp_path):
    script = "import sys, time; from pathlib import Path; from bitdance_scale.train.run_lock import RunLock\n"
    script += "RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} "):
            RunLock(tmp_path)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError, match=f"process {process.pid} "):
            RunLock(tmp_path)
    finally:
        process.kill()
    # Its parent has not waited for it yet: a zombie still has its number.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    begun_s = time.monotonic()
    with RunLock(tmp_path) as lock:
        assert f"from process {process.pid} on " in lock.taken_over and "has ended" in lock.taken_over
    assert time.monotonic() - begun_s < 10.0
    process.wait()


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path):
    held_by(tmp_path, process_start="12345")
    with RunLock(tmp_path) as lock:
        assert "that process has ended" in lock.taken_over


def test_a_silent_holder_on_another_machine_is_replaced(tmp_path):
    path = held_by(tmp_path, machine="elsewhere", host="node7")
    # Its clock may be wrong in either direction.
    os.utime(path, (time.time() + 1e6, time.time() + 1e6))
    with RunLock(tmp_path, STALE_S) as lock:
        assert "from process" in lock.taken_over and "on node7" in lock.taken_over
        assert "has not touched its lock for 1 s" in lock.taken_over
        assert lock._read() == lock._own


def test_a_holder_on_another_machine_that_beats_is_not_replaced(tmp_path):
    path = held_by(tmp_path, machine="elsewhere", host="node7")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on node7"):
            RunLock(tmp_path, STALE_S)
    finally:
        ended.set()
        thread.join()
    assert json.loads(path.read_text())["token"] == "another"


def test_the_next_start_of_a_slurm_job_does_not_wait(tmp_path, monkeypatch):
    held_by(tmp_path, machine="elsewhere", job="12", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path, stale_s=1000.0) as lock:
        assert "Slurm has started its job again" in lock.taken_over


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"host": 1'])
def test_a_damaged_lock_is_replaced_when_nobody_touches_it(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    with RunLock(tmp_path, STALE_S) as lock:
        assert "from an unknown process" in lock.taken_over


def test_a_holder_that_lost_the_folder_must_end(tmp_path):
    lock = RunLock(tmp_path)
    lock.beat()
    held_by(tmp_path, host="node7")
    with pytest.raises(TrainingError, match=r"no longer this process's .* on node7"):
        lock.beat()
    lock.__exit__()
    assert (tmp_path / LOCK_FILE).exists(), "it is not ours to remove"


def test_of_many_starts_at_once_one_takes_a_dead_holders_folder(tmp_path):
    for _ in range(20):
        held_by(tmp_path, process_start="12345")

        def start(_: int) -> RunLock | None:
            try:
                return RunLock(tmp_path, STALE_S)
            except ConfigError:
                return None

        with ThreadPoolExecutor(8) as threads:
            locks = [lock for lock in threads.map(start, range(8)) if lock is not None]
        assert len(locks) == 1
        locks[0].beat()
        locks[0].__exit__()
        assert not list(tmp_path.iterdir())


def test_without_hard_links_the_lock_still_has_one_holder(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("hard links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path), pytest.raises(ConfigError, match="another process trains"):
        RunLock(tmp_path)
