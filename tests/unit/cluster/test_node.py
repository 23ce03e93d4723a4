"""A node's part of a launch: the torchrun command, and requests to stop on their way to the workers."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitdance_scale.cli.launch import children
from cluster.node import torchrun_command

ROOT = Path(__file__).parents[3]
# Starts a worker in a session of its own, as torchrun does, and ends with it. The worker listens late.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], start_new_session=True).returncode)"
WORKER = """
import pathlib, signal, sys, time
pathlib.Path(sys.argv[1]).touch()
time.sleep(2)
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(75))
time.sleep(60)
"""
RUN = """
import sys
from bitdance_scale.cli import launch
from cluster.node import NodeRelay
launch.REPEAT_S = 0.5
with NodeRelay() as relay:
    sys.exit(relay.run([sys.executable, "-c", *sys.argv[1:]]))
"""


def test_ranks_follow_the_order_of_the_nodes():
    options = argparse.Namespace(
        nodes=4,
        procs=8,
        head="n0",
        port=20000,
        id="17.2",
        logs=Path("logs"),
        command=["entry.py", "a.toml", "run.steps=3"],
    )
    command = torchrun_command(options, 3, "n3")
    assert command[1:3] == ["-m", "torch.distributed.run"] and command[-3:] == options.command
    assert {"--nnodes=4", "--node-rank=3", "--nproc-per-node=8", "--master-addr=n0", "--rdzv-id=17.2"} <= set(command)
    assert "--log-dir=logs/ranks/n3" in command


def test_request_reaches_a_worker_that_does_not_listen_yet(tmp_path):
    for number in (signal.SIGUSR1, signal.SIGTERM):
        is_up = tmp_path / number.name
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, LAUNCHER, sys.executable, "-c", WORKER, is_up],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            deadline_s = time.monotonic() + 60
            while not is_up.exists():
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            # As Slurm does: every process of the step.
            (launcher,) = children(process.pid)
            (worker,) = children(launcher)
            for pid in (process.pid, launcher, worker):
                os.kill(pid, number)
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
            process.wait()


# As launch.sh and each_node.sh train, with a stand-in for torchrun whose rank listens at once.
TRAINING = """
set -euo pipefail
source cluster/start.sh
python=$PYTHON is_stop_asked=$IS_ASKED
run_trainer --nodes 1 --procs 1 --head 127.0.0.1 --port 1 --id 1 --logs "$LOGS" --node-rank 0 --node-name n0 \\
    -- "$PROGRAM"
exit "$step_code"
"""
TORCHRUN = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[-1]], start_new_session=True).returncode)
"""
PROGRAM = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); time.sleep(60)"


def python_under(pid: int) -> int:
    """The Python that a shell starts, at the moment when it is there."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for child in children(pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/exe").resolve() == Path(sys.executable).resolve():
                    return child
        time.sleep(0.001)
    raise AssertionError("no Python was started")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, None])
def test_a_request_before_the_trainer_listens_is_no_fault(number, tmp_path):
    run = tmp_path / "torch" / "distributed" / "run.py"
    run.parent.mkdir(parents=True)
    run.write_text(TORCHRUN)
    for folder in (run.parent, run.parent.parent):
        (folder / "__init__.py").touch()
    variables = {"PYTHON": sys.executable, "PYTHONPATH": f"{tmp_path}:{ROOT}", "LOGS": str(tmp_path)}
    # Without a signal to it: the launcher was asked before.
    environment = os.environ | variables | {"PROGRAM": PROGRAM, "IS_ASKED": "1" if number is None else "0"}
    process = subprocess.Popen(["bash", "-c", TRAINING], cwd=ROOT, env=environment)
    try:
        node = python_under(process.pid)
        if number is not None:
            # As Slurm does: every process of the step. The launcher repeats its own request.
            os.kill(node, number)
        deadline_s = time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < deadline_s
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        assert process.returncode == 75
    finally:
        process.kill()
        process.wait()


def test_children_of_a_process_that_has_ended_are_none():
    assert children(2**22 + 1) == []
