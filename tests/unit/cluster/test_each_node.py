"""each_node.sh with a stand-in for Python, which joins nodes and ends as a trainer would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitdance_scale.train.process import EXIT_HUNG, EXIT_REFUSED, EXIT_REQUEUE

ROOT = Path(__file__).parents[3]
EXIT_BAD_NODE = 3
# OUTCOME is the trainer's exit code; without it the trainer crashed. STEP is that of a checkpoint it has committed.
PYTHON = """#!/bin/bash
printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
case $2 in
cluster.join)
    joined=$3
    while [[ $1 != --start ]]; do shift; done
    [[ -z ${GREETING:-} ]] || echo "$GREETING"
    printf '%s\\n' "${START:-$2}" n0 n1 >"$joined"
    ;;
cluster.preflight)
    [[ -n ${BAD_NODES:-} ]] || exit 0
    mkdir -p "$3"
    echo "$BAD_NODES" >"$3/bad_nodes"
    echo "$BAD_NODES is bad" >"$3/verdict.txt"
    exit 1
    ;;
cluster.node)
    if [[ ${OUTCOME:-} == wait ]]; then
        exec "$REAL_PYTHON" -c "$WAITING"
    fi
    [[ -z ${STEP:-} ]] || echo "$STEP" >"$BITDANCE_EXIT_RECORD.step"
    [[ -z ${OUTCOME:-} ]] || echo "$OUTCOME" >"$BITDANCE_EXIT_RECORD"
    [[ ${OUTCOME:-} == 0 ]]
    ;;
esac
"""
# A trainer that listens. A shell cannot, to a signal that it was started to ignore.
WAITING = """
import os, pathlib, signal, sys, time

def stop(number, frame):
    pathlib.Path(os.environ["BITDANCE_EXIT_RECORD"]).write_text("75\\n")
    sys.exit(1)

signal.signal(signal.SIGUSR1, stop)
pathlib.Path(os.environ["CALLS"] + ".waits").touch()
time.sleep(60)
"""


class Node:
    """A node of a job whose logs lie in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "bin").mkdir()
        self._python = folder / "bin" / "python3"
        self._python.write_text(PYTHON)
        self._python.chmod(0o755)
        self.calls = folder / "calls"
        self.logs = folder / "logs" / "job"

    def begin(self, *settings: str, **variables: str) -> subprocess.Popen[str]:
        """Starts the script as a launcher does."""
        self.calls.write_text("")
        unset = ("SLURM", "NCCL", "PET_", "MAX_FAULTS")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        environment = {
            "PATH": f"{self._python.parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "REAL_PYTHON": sys.executable,
            "WAITING": WAITING,
            "LOG_ROOT": str(self.logs.parent),
            "JOB": "job",
            "GPUS_PER_NODE": "8",
            "WAIT_S": "2",
        }
        return subprocess.Popen(
            ["bash", "cluster/each_node.sh", "pt", "pipelines/pretrain.py", *settings],
            cwd=ROOT,
            env=inherited | environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *settings: str, **variables: str) -> tuple[int, str]:
        """Runs the script to its end; returns its exit code and what it printed."""
        process = self.begin(*settings, **variables)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed


@pytest.fixture
def node(tmp_path) -> Node:
    return Node(tmp_path)


def test_the_trainer_gets_its_settings_and_its_place(node):
    others = {"PET_NNODES": "1", "PET_MASTER_ADDR": "n0.job", "PET_MASTER_PORT": "21000", "CONFIG": "mine.toml"}
    code, printed = node.run("run.steps=3", "data.shards=['a b']", OUTCOME="0", **others)
    assert code == 0 and "the run is complete" in printed, printed
    join, preflight, train = node.calls.read_text().splitlines()
    assert "|--nodes|1|--rank|0|" in join and "|--head|n0.job|--port|21006|--start|0|" in join
    assert "|--head|n0.job|--port|21001|--gpus|8|--procs|8|--node-rank|0|" in preflight
    assert preflight.endswith("|--config|mine.toml|run.steps=3|data.shards=['a b']|")
    assert "|--nodes|1|--procs|8|--head|n0.job|--port|21000|--id|job.0|" in train
    assert "|--node-rank|0|--node-name|n0|--|pipelines/pretrain.py|mine.toml|checkpoint.fall_back=true|" in train
    assert train.endswith("|run.steps=3|data.shards=['a b']|")
    assert printed in (node.logs / "0" / "0-n0.log").read_text()


def test_what_a_library_prints_is_no_name_of_a_node(node):
    code, printed = node.run(OUTCOME="0", GREETING="a library says hello", PREFLIGHT="0")
    assert code == 0 and "a library says hello" in printed and "start 1: node 0 of 1, n0" in printed, printed


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"OUTCOME": "0"}, 0, "the run is complete"),
        ({"OUTCOME": "2"}, EXIT_REFUSED, "refused: see"),
        ({"OUTCOME": "75"}, EXIT_REQUEUE, "stopped on request and saved; to be started again"),
        ({}, EXIT_REQUEUE, "fault 1 of 2 allowed"),
        ({"MAX_FAULTS": "0"}, 1, "gave up at fault 1, 0 allowed"),
        ({"OUTCOME": "76", "MAX_FAULTS": "0"}, EXIT_HUNG, "(a rank hung"),
        ({"BAD_NODES": "n1"}, EXIT_BAD_NODE, "n1 is bad"),
        ({"BAD_NODES": "n1", "NEW_NODES": "1"}, EXIT_REQUEUE, "fault 1 of 2 allowed (bad nodes n1"),
        ({"GPUS_PER_NODE": ""}, EXIT_REFUSED, "neither GPUS_PER_NODE nor PROCS_PER_NODE is set"),
    ],
)
def test_end_of_the_trainer_decides(node, variables, code, message):
    found, printed = node.run(**variables)
    assert found == code and message in printed, printed
    if "GPUS_PER_NODE" not in variables:
        assert (node.logs / "0" / "decision").read_text() == f"{code}\n"


def test_faults_count_until_a_stop_a_checkpoint_or_a_new_start_by_hand(node):
    ends = [("", ""), ("", ""), ("75", ""), ("", ""), ("", "100"), ("", ""), ("", ""), ("", ""), ("0", "")]
    codes = [node.run(OUTCOME=outcome, STEP=step, PREFLIGHT="0")[0] for outcome, step in ends]
    # The step of the fifth start makes its own fault the first one; the ninth start follows a final decision.
    assert codes == [75, 75, 75, 75, 75, 75, 1, 75, 0]


@pytest.mark.parametrize(("allowed", "code"), [("1", 0), ("0", 1)])
def test_a_start_that_was_killed_counts_as_a_fault(node, allowed, code):
    (node.logs / "0").mkdir(parents=True)
    found, printed = node.run(OUTCOME="0", MAX_FAULTS=allowed, PREFLIGHT="0")
    assert found == code, printed
    assert ("gave up at fault 1, 0 allowed (start 1 left no decision)" in printed) is bool(code)
    assert ("cluster.node" in node.calls.read_text()) is not bool(code)


def test_a_request_to_stop_reaches_the_trainer(node):
    process = node.begin(OUTCOME="wait", PREFLIGHT="0")
    waits = Path(f"{node.calls}.waits")
    deadline_s = time.monotonic() + 60
    while not waits.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    # A signal before the script waits for its trainer is passed on ten seconds later.
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE and "stopped on request and saved" in printed


@pytest.mark.parametrize("decision", ["0", "2", "75", ""])
def test_other_nodes_end_as_the_first_one_decides(node, decision):
    (node.logs / "3" / "ended").mkdir(parents=True)
    if decision:
        (node.logs / "3" / "decision").write_text(f"{decision}\n")
    # Its own trainer ended in another way.
    code, printed = node.run(NODE_RANK="1", NUM_NODES="2", START="3", OUTCOME="", WAIT_S="1", PREFLIGHT="0")
    assert code == int(decision or EXIT_REQUEUE), printed
    assert ("the first node has not decided" in printed) is (decision == "")
