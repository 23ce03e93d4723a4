"""The files of cluster/ against the schemas of those who read them, in .venv-launchers (make test-launchers)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launchers.kubernetes import JOBSET, ROOT, TRAINJOB

pytestmark = pytest.mark.launchers

BIN = ROOT / ".venv-launchers" / "bin"
SKYPILOT = ROOT / "cluster" / "skypilot" / "job.yaml"


def run(command: list[object], home: Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        # SkyPilot keeps a database in the home folder and would send statistics.
        env=os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout


def validate(path: Path, home: Path) -> tuple[int, str]:
    return run([BIN / "python", ROOT / "tests" / "launchers" / "schemas.py", path], home)


@pytest.mark.parametrize("path", [JOBSET, TRAINJOB, SKYPILOT], ids=lambda path: path.parent.name + "/" + path.name)
def test_file_is_what_its_reader_expects(tmp_path, path):
    code, printed = validate(path, tmp_path)
    assert code == 0, printed


@pytest.mark.parametrize(
    ("path", "right", "wrong", "found"),
    [
        (JOBSET, "onJobFailureReasons:", "onJobFailureReason:", "onJobFailureReason: no such field"),
        (JOBSET, "publishNotReadyAddresses:", "publishNotReady:", "publishNotReady: no such field"),
        (JOBSET, "maxRestarts: 0", "maxRestarts: none", "maxRestarts"),
        (JOBSET, "operator: NotIn", "operator: Without", "Without"),
        (TRAINJOB, "numNodes: 8", "numNodes: all", "numNodes"),
        (TRAINJOB, "runtimeRef:", "runtime:", "runtimeRef"),
        (TRAINJOB, "terminationGracePeriodSeconds:", "gracePeriodSeconds:", "gracePeriodSeconds"),
        (SKYPILOT, "job_recovery:", "recovery:", "recovery"),
        (SKYPILOT, "num_nodes: 2", "num_nodes: two", "num_nodes"),
    ],
)
def test_a_slip_in_it_is_found(tmp_path, path, right, wrong, found):
    text = path.read_text(encoding="utf-8")
    assert right in text
    changed = tmp_path / path.name
    changed.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    code, printed = validate(changed, tmp_path)
    assert code != 0 and found in printed, printed


def test_dockerfile_has_no_finding(tmp_path):
    code, printed = run([BIN / "hadolint", ROOT / "cluster" / "container" / "Dockerfile"], tmp_path)
    assert (code, printed) == (0, "")
