"""The launch scripts on a Slurm of one node, which tests/slurm/run.sh starts: stopped, preempted, refused, broken, cancelled."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
NUM_STEPS = 14
# What a cluster's .sbatch asks for and one node without GPUs does not have.
ON_THIS_NODE = ("--nodes=1", "--gpus-per-node=0")
TIMEOUT_S = 150


def slurm(*command: object, **variables: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout.strip()


def submit(folder: Path, *command: object, **variables: str) -> str:
    """Submits a job whose log goes to `folder`; returns its id."""
    variables = {"LOG_ROOT": str(folder / "logs"), "PROCS_PER_NODE": "2"} | variables
    return slurm("sbatch", "--parsable", *ON_THIS_NODE, f"--output={folder}/job.log", *command, **variables)


def submit_stand_in(folder: Path, mode: str, **variables: str) -> str:
    options = ("--exclusive", "--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=B:USR1@60")
    entry = ("cluster/launch.sh", "stand_in", "tests/slurm/stand_in.py", "none.toml", mode, folder / "waits")
    return submit(folder, *options, *entry, PREFLIGHT="0", PROCS_PER_NODE="1", **variables)


def show(job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", slurm("scontrol", "show", "job", "-o", job)))


def wait_until(is_so: Callable[[], bool], log: Path) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.2)


def wait_for_end(job: str, log: Path) -> dict[str, str]:
    wait_until(lambda: show(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), log)
    return show(job)


def wait_for_steps(run: Path, num_steps: int, log: Path) -> None:
    metrics = run / METRICS_FILE
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= num_steps, log)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((run / "checkpoints" / f"step_{NUM_STEPS:08d}" / "tensors").glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_stopped_and_preempted_job_ends_as_the_uninterrupted_one(tmp_path):
    overrides = small_demo(tmp_path / "material", num_steps=NUM_STEPS, save_every=100)
    config = {"CONFIG": "pipelines/configs/demo.toml"}

    def start(name: str, **variables: str) -> tuple[str, Path, Path]:
        folder = tmp_path / name
        folder.mkdir()
        job = submit(folder, "cluster/pt.sbatch", *overrides, f"run.root={folder}", **config, **variables)
        return job, folder / "demo", folder / "job.log"

    job, run, log = start("interrupted")
    wait_for_steps(run, 2, log)
    # As Slurm does ahead of the time limit.
    slurm("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: "start 2" in log.read_text(), log)
    stopped_step = len(read_metrics(run / METRICS_FILE))
    assert 2 <= stopped_step < NUM_STEPS - 2
    wait_for_steps(run, stopped_step + 2, log)
    # Slurm takes the node for it: SIGTERM to the steps of the first job, which has some time to leave.
    urgent = slurm("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
    end = wait_for_end(job, log)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "2"), log.read_text()
    assert show(urgent)["JobState"] == "COMPLETED"
    text = log.read_text()
    assert text.count("stopped on request and saved; requeued") == 2 and "the run is complete" in text
    assert text.count("pre-flight: 1 nodes are good (no GPUs)") == 3
    node = end["NodeList"]
    for start_number in range(3):
        assert (tmp_path / "interrupted" / "logs" / job / str(start_number) / f"{node}.log").stat().st_size > 0

    job, reference, log = start("uninterrupted", PREFLIGHT="0")
    end = wait_for_end(job, log)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), log.read_text()
    expected, found = tensors(reference), tensors(run)
    assert found.keys() == expected.keys() and len(found) > 100
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    losses = [[(point.step, point.loss) for point in read_metrics(path / METRICS_FILE)] for path in (run, reference)]
    assert losses[0] == losses[1] and len(losses[0]) == NUM_STEPS


def test_refused_settings_end_the_job_at_once(tmp_path):
    config = {"CONFIG": "pipelines/configs/demo.toml", "PREFLIGHT": "0"}
    job = submit(tmp_path, "cluster/pt.sbatch", "run.stepz=3", f"run.root={tmp_path}", **config)
    end = wait_for_end(job, tmp_path / "job.log")
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "2:0")
    (node_log,) = (tmp_path / "logs" / job / "0").glob("*.log")
    assert "run.stepz" in node_log.read_text()


def test_fault_is_not_repeated_for_ever(tmp_path):
    job = submit_stand_in(tmp_path, "crash", MAX_FAULTS="1")
    end = wait_for_end(job, tmp_path / "job.log")
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "1", "1:0")
    assert "failed for good after 2 faults" in (tmp_path / "job.log").read_text()


def test_cancelled_job_does_not_come_back(tmp_path):
    job, log = submit_stand_in(tmp_path, "wait"), tmp_path / "job.log"
    wait_until(lambda: (tmp_path / "waits").exists(), log)
    slurm("scancel", job)
    wait_until(lambda: "not requeued" in log.read_text(), log)
    end = wait_for_end(job, log)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), log.read_text()


def test_bad_node_is_named(tmp_path):
    job = submit(tmp_path, "cluster/pt.sbatch", PREFLIGHT_OPTIONS="--min-local-gbs 1e6")
    end = wait_for_end(job, tmp_path / "job.log")
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "3:0")
    node, text = end["NodeList"], (tmp_path / "job.log").read_text()
    assert f"pre-flight: {node}: all-reduce over its own GPUs" in text and f"--exclude={node}" in text


def test_chain_waits_stage_by_stage(tmp_path):
    options = " ".join((*ON_THIS_NODE, "--hold", f"--output={tmp_path}/job.log"))
    settings = (f"run.root='{tmp_path}'", "data.shards=['a b']", "run.start_from=imported")
    printed = slurm("bash", "cluster/pt.sbatch", *settings, CHAIN="1", CHAIN_OPTIONS=options)
    jobs = re.findall(r"chain: (\w+) is job (\d+)", printed)
    try:
        assert [stage for stage, _ in jobs] == ["pt", "ct", "sft", "distill"], printed
        for (_, before), (stage, job) in zip(jobs[:-1], jobs[1:], strict=True):
            shown = show(job)
            assert shown["Dependency"].startswith(f"afterok:{before}"), shown
            assert shown["JobName"] == f"{stage}_14b"
        assert "Dependency" not in show(jobs[0][1]) or show(jobs[0][1])["Dependency"] == "(null)"
    finally:
        slurm("scancel", *(job for _, job in jobs))
