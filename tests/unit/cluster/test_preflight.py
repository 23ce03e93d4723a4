"""The pre-flight as nodes run it, on this machine: with good nodes, a missing node and failing processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster import preflight
from cluster.probe import bus_gbs
from cluster.verdict import Finding, Gpu, Report

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(folder: Path, index: int, port: int, num_procs: int, *nodes: str) -> subprocess.Popen[str]:
    environment = os.environ | {"SLURM_NODEID": str(index), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cluster.preflight", folder, "--nodes", *nodes, "--head", nodes[0], "--port", port]
    command += ["--gpus", 0, "--procs", num_procs]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would share a GPU")
def test_two_nodes_that_are_good(tmp_path):
    # Two names of one machine.
    nodes, port = ("localhost", "127.0.0.1"), free_port()
    processes = [start(tmp_path, index, port, 1, *nodes) for index in (0, 1)]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    verdict = (tmp_path / preflight.VERDICT).read_text()
    assert "2 nodes are good (no GPUs)" in verdict and "between nodes" in verdict and "clocks within 0.0" in verdict
    for name, other in (nodes, nodes[::-1]):
        report = Report.from_json((tmp_path / f"{name}.json").read_text())
        assert report.phase == "done" and report.errors == () and report.gpus == ()
        ((partner, gbs),) = report.pairs
        assert partner == other and gbs > 0


def test_missing_node_is_waited_for_and_then_named(tmp_path):
    (tmp_path / "n0.json").write_text(Report("n0", phase="done").to_json())
    reports = preflight.wait_for_reports(tmp_path, ["n0", "n1"], timeout_s=0.3)
    assert reports["n0"].phase == "done" and reports["n1"] is None


def test_verdict_names_every_bad_node_once():
    found = [Finding("n1", "a", "b", "c"), Finding("n1", "d", "e", "f"), Finding("n4", "g", "h", "i")]
    text = preflight.verdict_text({}, found, "sbatch --exclude=")
    assert text.splitlines()[0] == "pre-flight: n1: a; rule: b; fix: c"
    assert text.rstrip().endswith("sbatch --exclude=n1,n4")


@pytest.mark.parametrize("is_good", [True, False])
def test_all_nodes_learn_the_verdict_of_the_first_one(tmp_path, is_good):
    port = free_port()
    options = preflight.argparse.Namespace(nodes=["n0", "n1"], procs=1, folder=tmp_path)
    nodes = [preflight.Preflight(options, index) for index in (0, 1)]
    for index, node in enumerate(nodes):
        node._store = preflight.TCPStore("127.0.0.1", port, is_master=index == 0, wait_for_workers=False)
    nodes[0].tell_verdict(is_good=is_good)
    assert nodes[1].wait_for_verdict() is is_good


def test_job_goes_on_without_few_bad_nodes_only():
    found = [Finding("n1", "a", "b", "c"), Finding("n1", "d", "e", "f"), Finding("n4", "g", "h", "i")]
    assert preflight.bad_nodes(found, 4) == ["n1", "n4"]
    assert preflight.bad_nodes(found, 3) == [] == preflight.bad_nodes([], 3)


def test_failed_process_of_the_probe_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.sys, "executable", "/bin/false")
    options = preflight.argparse.Namespace(nodes=["n0"], procs=2, folder=tmp_path, port=1)
    with pytest.raises(RuntimeError, match=r"process 0, 1 of the node failed|process [01] of the node failed"):
        preflight.Preflight(options, 0)._all_reduce("localhost", 1, 0, 1)


# In the place of Python: prints as NCCL does, more than a pipe holds, and leaves what it is told to leave.
NOISY = """#!/bin/bash
echo "NCCL version 2.29.3+cuda13.0"
head --bytes=102400 /dev/zero | tr '\\0' 'x'
echo
[[ $LOCAL_RANK != 0 || -z $LEFT ]] || echo "$LEFT" >"$PROBE_RESULT"
"""


@pytest.fixture
def noisy_probe(tmp_path, monkeypatch):
    """Runs an all-reduce whose processes print a lot, and the first leaves `left`; returns the bandwidth."""
    (tmp_path / "python").write_text(NOISY)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(preflight.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(preflight, "TIMEOUT_S", 20.0)
    options = preflight.argparse.Namespace(nodes=["n0"], procs=2, folder=tmp_path, port=1)

    def run(left: str) -> float:
        monkeypatch.setenv("LEFT", left)
        return preflight.Preflight(options, 0)._all_reduce("localhost", 1, 0, 1)

    return run


def test_what_nccl_prints_is_no_bandwidth(noisy_probe, capfd):
    assert noisy_probe("123.456") == 123.456
    # It is in the node's log.
    assert capfd.readouterr().out.count("NCCL version") == 2


def test_a_probe_that_leaves_no_bandwidth_is_an_error(noisy_probe):
    noisy_probe("1.5")
    # That of the all-reduce before is not taken for it.
    with pytest.raises(RuntimeError, match="process 0 of the node ended without writing its bandwidth to .*n0.gbs"):
        noisy_probe("")
    with pytest.raises(RuntimeError, match="process 0 of the node wrote 'fast.*' as its bandwidth to .*n0.gbs, no"):
        noisy_probe("fast")


class OneGpu(preflight.Preflight):
    """A pre-flight that finds a GPU and looks at nothing but it and the compiler."""

    def _common_clock(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("config", "is_looked_for"),
    [
        (["pt_14b"], True),
        (["pt_14b", "model.attention=dense", "parallel.compile=false"], False),
        (["pt_14b", "model.attention=dense"], True),
        (["no_such_config"], False),
        (None, False),
    ],
)
def test_compiler_is_looked_for_where_kernels_are_compiled(config, is_looked_for, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_gpus", lambda: (Gpu("H100", 79.6, 0.5),))
    monkeypatch.setattr(preflight, "compiler_fault", lambda: "no compiler")
    options = preflight.argparse.Namespace(nodes=["n0"], procs=1, folder=tmp_path, config=config)
    report = OneGpu(options, 0).run()
    assert report.phase == "done" and report.errors == ()
    assert report.compiler_fault == ("no compiler" if is_looked_for else None)


def test_bus_bandwidth_counts_what_a_link_carries():
    # A ring of 4 sends 2 x 3 pieces of a quarter over every link.
    assert bus_gbs(4 * 10**9, 4, 2.0) == pytest.approx(3.0)
