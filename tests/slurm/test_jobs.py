"""Jobs on the Slurm that tests/slurm/run.sh starts: stopped, preempted, refused, broken, cancelled, chained.

One machine plays three nodes, n1 to n3. A job of two nodes does what it does on real ones: srun's tasks, the
rendezvous, the pre-flight's pairs, signals to every process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DEMO = "demo"
NUM_STEPS = 14
# Replaces what the .sbatch files ask for.
WITHOUT_GPUS = "--gpus-per-node=0"
# For one event, also on busy cores; whatever takes longer hangs.
TIMEOUT_S = 400
# An interpreter with which the pre-flight sees a clock on n2 that is a minute fast.
WRONG_CLOCK = """
[[ $SLURMD_NODENAME == n2 && $2 == cluster.preflight ]] || exec {python} "$@"
exec {python} -c '
import runpy, sys, time
right = time.time
time.time = lambda: right() + 60
sys.argv = sys.argv[2:]
runpy.run_module("cluster.preflight", run_name="__main__")' "$@"
"""


def slurm(*command: object, **variables: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout.strip()


def submit(folder: Path, *command: object, **variables: str) -> str:
    """Submits a job of two nodes whose log goes to `folder`; returns its id."""
    variables = {"LOG_ROOT": str(folder / "logs"), "PROCS_PER_NODE": "1", "PREFLIGHT": "0"} | variables
    options = ("--parsable", "--nodes=2", WITHOUT_GPUS, f"--output={folder}/job.log")
    return slurm("sbatch", *options, *command, **variables)


def submit_stand_in(folder: Path, mode: str, *more_options: str, **variables: str) -> str:
    options = ("--exclusive", "--ntasks-per-node=1", "--requeue", "--open-mode=append", *more_options)
    entry = ("cluster/launch.sh", "stand_in", "tests/slurm/stand_in.py", mode, folder / "waits")
    return submit(folder, *options, *entry, **variables)


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


# Four starts of the trainer, on cores that may be busy.
@pytest.mark.timeout(1500)
def test_stopped_and_preempted_job_ends_as_the_uninterrupted_one(tmp_path):
    overrides = small_demo(tmp_path / "material", num_steps=NUM_STEPS, save_every=100)

    def start(name: str) -> tuple[str, Path, Path]:
        folder = tmp_path / name
        folder.mkdir()
        job = submit(folder, "cluster/pt.sbatch", *overrides, f"run.root={folder}", CONFIG=DEMO)
        return job, folder / "demo", folder / "job.log"

    job, run, log = start("interrupted")
    wait_for_steps(run, 2, log)
    # As Slurm does before the time limit.
    slurm("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: "start 2" in log.read_text(), log)
    stopped_step = len(read_metrics(run / METRICS_FILE))
    assert 2 <= stopped_step < NUM_STEPS - 2
    wait_for_steps(run, stopped_step + 2, log)
    # Slurm takes the nodes for this job: SIGTERM to the steps of the first one, which then has its grace time.
    options = ("--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null")
    urgent = slurm("sbatch", *options, "--wrap=true")
    end = wait_for_end(job, log)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "2"), log.read_text()
    assert show(urgent)["JobState"] == "COMPLETED"
    text = log.read_text()
    assert text.count("stopped on request and saved; requeued") == 2 and "the run is complete" in text
    for start_number in range(3):
        logs = sorted((tmp_path / "interrupted" / "logs" / job / str(start_number)).glob("*.log"))
        assert [path.name[:2] for path in logs] == ["0-", "1-"]

    job, reference, log = start("uninterrupted")
    end = wait_for_end(job, log)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), log.read_text()
    expected, found = tensors(reference), tensors(run)
    assert found.keys() == expected.keys() and len(found) > 100
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    losses = [[(point.step, point.loss) for point in read_metrics(path / METRICS_FILE)] for path in (run, reference)]
    assert losses[0] == losses[1] and len(losses[0]) == NUM_STEPS


@pytest.fixture(scope="module")
def limited_job(tmp_path_factory) -> tuple[str, Path]:
    """A job of one node with a limit of two minutes, signalled after one; it runs while other tests do."""
    folder = tmp_path_factory.mktemp("limited")
    return submit_stand_in(folder, "wait", "--nodes=1", "--time=2", "--signal=B:USR1@60"), folder / "job.log"


@pytest.mark.usefixtures("limited_job")
def test_refused_settings_end_the_job_at_once(tmp_path):
    job = submit(tmp_path, "cluster/pt.sbatch", "run.stepz=3", f"run.root={tmp_path}", CONFIG=DEMO)
    end = wait_for_end(job, tmp_path / "job.log")
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "2:0")
    (first_log,) = (tmp_path / "logs" / job / "0").glob("0-*.log")
    assert "run.stepz" in first_log.read_text()


def test_fault_is_not_repeated_for_ever(tmp_path):
    job = submit_stand_in(tmp_path, "crash", MAX_FAULTS="1")
    end = wait_for_end(job, tmp_path / "job.log")
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "1", "1:0")
    assert "gave up at fault 2, 1 allowed" in (tmp_path / "job.log").read_text()


def test_a_stop_while_python_starts_is_no_fault(tmp_path):
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/bash\ntouch "{tmp_path}/starts"\nsleep 4\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    job, log = submit_stand_in(tmp_path, "wait", PYTHON=str(slow), MAX_FAULTS="0"), tmp_path / "job.log"
    wait_until((tmp_path / "starts").exists, log)
    slurm("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: re.search("start 2|gave up", log.read_text()) is not None, log)
    assert "stopped on request and saved; requeued" in log.read_text()
    slurm("scancel", job)
    wait_for_end(job, log)


def test_a_hang_is_named_and_counts_as_a_fault(tmp_path):
    job = submit_stand_in(tmp_path, "hang", MAX_FAULTS="0")
    end = wait_for_end(job, tmp_path / "job.log")
    text = (tmp_path / "job.log").read_text(encoding="utf-8")
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "76:0"), text
    assert "TrainingError: the job hangs: rank 1 does not answer" in text
    assert "gave up at fault 1, 0 allowed (a rank hung; see" in text


def test_faults_count_anew_after_a_new_checkpoint(tmp_path):
    job = submit_stand_in(tmp_path, "advance", MAX_FAULTS="1")
    end = wait_for_end(job, tmp_path / "job.log")
    text = (tmp_path / "job.log").read_text(encoding="utf-8")
    # Three starts end with a checkpoint and a first fault each; the fourth gets no further, which is a second fault.
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "3", "1:0"), text
    assert text.count("fault 1 of 1 allowed") == 3 and "gave up at fault 2, 1 allowed" in text
    assert (tmp_path / "logs" / job / "step").read_text(encoding="utf-8") == "300\n"


def test_cancelled_job_does_not_come_back(tmp_path):
    job, log = submit_stand_in(tmp_path, "wait"), tmp_path / "job.log"
    wait_until((tmp_path / "waits").exists, log)
    slurm("scancel", job)
    wait_until(lambda: "not requeued" in log.read_text(), log)
    end = wait_for_end(job, log)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), log.read_text()


def test_job_requeues_itself_ahead_of_its_time_limit(limited_job):
    job, log = limited_job
    try:
        # On busy cores it may have started more than twice by now.
        wait_until(lambda: int(show(job)["Restarts"]) >= 1, log)
        text = log.read_text()
        assert "stopped on request and saved; requeued" in text and "TIME LIMIT" not in text
    finally:
        slurm("scancel", job)
        wait_for_end(job, log)


def test_bad_node_is_named_and_left_out(tmp_path):
    wrong_clock = tmp_path / "python"
    wrong_clock.write_text(f"#!/bin/bash\n{WRONG_CLOCK.format(python=sys.executable)}")
    wrong_clock.chmod(0o755)
    job = submit_stand_in(tmp_path, "finish", PREFLIGHT="1", PYTHON=str(wrong_clock))
    log = tmp_path / "job.log"
    end = wait_for_end(job, log)
    text = log.read_text()
    assert (end["JobState"], end["Restarts"], end["ExcNodeList"]) == ("COMPLETED", "1", "n2"), text
    assert "pre-flight: n2: its clock is +60" in text and "--exclude=n2" in text
    assert "pre-flight: 2 nodes are good (no GPUs); all-reduce between nodes" in text
    assert end["NodeList"] in ("n[1,3]", "n1,n3")


def test_chain_waits_stage_by_stage(tmp_path):
    options = " ".join((WITHOUT_GPUS, "--nodes=2", "--hold", f"--output={tmp_path}/job.log"))
    settings = (f"run.root='{tmp_path}'", "data.shards=['a b']", "run.start_from=imported")
    printed = slurm("bash", "cluster/pt.sbatch", *settings, CHAIN="1", CHAIN_OPTIONS=options)
    jobs = re.findall(r"chain: (\w+) is job (\d+)", printed)
    try:
        assert [stage for stage, _ in jobs] == ["pt", "ct", "sft", "distill"], printed
        for (_, before), (stage, job) in pairwise(jobs):
            shown = show(job)
            assert shown["Dependency"].startswith(f"afterok:{before}"), shown
            assert shown["JobName"] == f"{stage}_14b"
        assert "Dependency" not in show(jobs[0][1]) or show(jobs[0][1])["Dependency"] == "(null)"
    finally:
        slurm("scancel", *(job for _, job in jobs))
