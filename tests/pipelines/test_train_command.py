"""`bitdance train` with real ranks: as two machines, refused, stopped; and a refusal under plain torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from bitdance_scale.train.process import EXIT_REFUSED, EXIT_REQUEUE
from tests.distributed.small_demo import small_demo

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "bitdance_scale.cli", "train", "demo"]
TIMEOUT_S = 240


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """(exit code, what was printed) of each."""
    try:
        printed = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def two_machines(folder: Path, *overrides: str) -> list[tuple[int, str]]:
    """The same command twice on this machine, as node 0 and node 1 of a job with a process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = ["--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    return finish(*(start([*TRAIN, *ranks, "--node-rank", str(node), *overrides], folder) for node in range(2)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder, overrides) of a run of two steps, made by two machines."""
    folder = tmp_path_factory.mktemp("run")
    overrides = small_demo(folder, num_steps=2, save_every=100)
    for code, printed in two_machines(folder, *overrides):
        assert code == 0, printed[-4000:]
    return folder, overrides


def test_two_machines_make_one_run(run):
    metrics = read_metrics(run[0] / "runs" / "demo" / METRICS_FILE)
    assert [point.step for point in metrics] == [1, 2]


@pytest.mark.large
@pytest.mark.timeout(540)
def test_a_refusal_of_the_ranks_is_the_last_thing_on_both_screens(run):
    folder, overrides = run
    for code, printed in two_machines(folder, *overrides, "model.num_layers=3"):
        assert code == EXIT_REFUSED, printed[-4000:]
        assert "ChildFailedError" in printed
        assert printed.rstrip().splitlines()[-1].startswith("ConfigError: ")


@pytest.mark.timeout(540)
def test_a_request_to_stop_saves_and_ends_with_75(run):
    folder, overrides = run
    process = start([*TRAIN, *overrides, "run.steps=5000", "--nproc", "2"], folder)
    metrics = folder / "runs" / "demo" / METRICS_FILE
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ((code, printed),) = finish(process)
    assert code == EXIT_REQUEUE, printed[-4000:]
    assert printed.rstrip().splitlines()[-1] == "stopped on request and saved; the same command goes on from there"
    newest = (folder / "runs" / "demo" / "checkpoints" / "latest").read_text().strip()
    assert newest == f"step_{len(metrics.read_text().splitlines()):08d}"


def test_a_refusal_ends_the_report_of_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    overrides = ["run.stepz=3", "parallel.tensor=x"]
    ((code, printed),) = finish(start([*torchrun, "pipelines/pretrain.py", "demo", *overrides], ROOT))
    assert code == 1
    last_ten = "\n".join(printed.rstrip().splitlines()[-10:])
    assert "ConfigError: demo: the configuration cannot be used:" in last_ten
    assert "unknown setting 'run.stepz'; did you mean 'run.steps'?" in last_ten
    assert "parallel.tensor = 'x': expected an integer" in last_ten
