"""Training as the files of cluster/kubernetes say, on two pods that are processes of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo
from tests.launchers.kubernetes import (
    FAIL_JOBSET,
    JOBSET,
    RESTART_UNCOUNTED,
    ROOT,
    TRAINJOB,
    Pods,
    container_of,
    job_of,
    jobset_action,
    read_jobset,
    set_env,
)
from tests.unit.cluster.test_preflight import free_port

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(900)]

NUM_STEPS = 12
# For one start of two pods, also on busy cores; whatever takes longer hangs.
START_S = 300


class Cluster:
    """A JobSet of two pods whose volume and image lie in a folder."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.root, self.log = folder / "image", folder / "log"
        self.root.mkdir()
        for name in ("bitdance_scale", "cluster", "pipelines", "tests"):
            (self.root / name).symlink_to(ROOT / name)
        # The claim of the run folders.
        self.runs = self.root / "runs"
        self.runs.mkdir()
        self.jobset = read_jobset(path)
        job_of(self.jobset).update(completions=2, parallelism=2)
        # NUM_NODES of the TrainJob is the Trainer's.
        variables = {"PROCS_PER_NODE": "1", "GPUS_PER_NODE": "0", "CONFIG": "demo"}
        for name in ("NUM_NODES", "PET_NNODES"):
            if any(entry["name"] == name for entry in container_of(self.jobset)["env"]):
                variables[name] = "2"
        set_env(self.jobset, **variables)

    def start(self, *settings: str, **variables: str) -> Pods:
        """Makes the pods, with the entry point's settings."""
        set_env(self.jobset, MASTER_PORT=str(free_port()), **variables)
        container_of(self.jobset)["args"] = [*container_of(self.jobset)["args"][:2], *settings]
        return Pods(self.jobset, self.root, self.log)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture
def pods() -> Iterator[list[Pods]]:
    """Pods to be ended after the test."""
    started: list[Pods] = []
    yield started
    for pods in started:
        pods.kill()


def wait_for_steps(run: Path, num_steps: int, cluster: Cluster) -> None:
    metrics, deadline_s = run / METRICS_FILE, time.monotonic() + START_S
    while not metrics.exists() or metrics.read_text().count("\n") < num_steps:
        assert time.monotonic() < deadline_s, cluster.text()
        time.sleep(0.1)


@pytest.mark.parametrize("path", [JOBSET, TRAINJOB], ids=["jobset", "trainjob"])
def test_evicted_pod_stops_all_and_the_next_pods_go_on(tmp_path, pods, path):
    cluster = Cluster(tmp_path, path)
    settings = small_demo(tmp_path / "material", num_steps=NUM_STEPS, save_every=100)
    run = cluster.runs / "demo"
    pods.append(cluster.start(*settings))
    wait_for_steps(run, 2, cluster)
    # The second pod's machine is drained: nobody tells the first one.
    pods[0].terminate(1)
    reason = pods[0].end(START_S)
    assert jobset_action(cluster.jobset, reason) == RESTART_UNCOUNTED, cluster.text()
    assert [process.returncode for process in pods[0].processes] == [75, 75], cluster.text()
    stopped_step = len(read_metrics(run / METRICS_FILE))
    assert 2 <= stopped_step < NUM_STEPS
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{stopped_step:08d}"]

    pods.append(cluster.start(*settings))
    assert pods[1].end(START_S) == "", cluster.text()
    assert [point.step for point in read_metrics(run / METRICS_FILE)] == list(range(1, NUM_STEPS + 1))
    text = cluster.text()
    assert "2 nodes are good" in text and "stopped on request and saved; to be started again" in text
    logs = cluster.runs / "jobs" / cluster.jobset["metadata"]["name"]
    assert [(logs / start / "decision").read_text() for start in "01"] == ["75\n", "0\n"]
    assert sorted(path.name for path in (logs / "1").glob("*.log")) == ["0-machine0.log", "1-machine1.log"]


def test_refused_settings_end_the_job_for_good(tmp_path, pods):
    cluster = Cluster(tmp_path, JOBSET)
    pods.append(cluster.start("run.stepz=3", PREFLIGHT="0"))
    reason = pods[0].end(START_S)
    assert (reason, jobset_action(cluster.jobset, reason)) == ("PodFailurePolicy", FAIL_JOBSET), cluster.text()
    assert "run.stepz" in cluster.text()


def test_pods_that_crash_are_started_again_until_they_crash_too_often(tmp_path, pods):
    cluster = Cluster(tmp_path, JOBSET)
    container_of(cluster.jobset)["args"] = ["pt", "tests/slurm/stand_in.py"]
    variables = {"MAX_FAULTS": "1", "PREFLIGHT": "0", "WAIT_S": "20"}
    actions = []
    for _ in range(2):
        pods.append(cluster.start("crash", str(tmp_path / "file"), **variables))
        actions.append(jobset_action(cluster.jobset, pods[-1].end(START_S)))
    assert actions == [RESTART_UNCOUNTED, FAIL_JOBSET], cluster.text()
    assert "gave up at fault 2, 1 allowed" in cluster.text()


def test_a_lost_machine_is_a_fault_and_its_pods_are_replaced(tmp_path, pods):
    cluster = Cluster(tmp_path, JOBSET)
    container_of(cluster.jobset)["args"] = ["pt", "tests/slurm/stand_in.py"]
    waits = tmp_path / "waits"
    pods.append(cluster.start("wait", str(waits), PREFLIGHT="0", WAIT_S="10"))
    deadline_s = time.monotonic() + START_S
    while not waits.exists():
        assert time.monotonic() < deadline_s, cluster.text()
        time.sleep(0.1)
    pods[0].kill()
    reason = pods[0].end(1)
    assert (reason, jobset_action(cluster.jobset, reason)) == ("BackoffLimitExceeded", RESTART_UNCOUNTED)
    pods.append(cluster.start("finish", str(waits), PREFLIGHT="0", WAIT_S="10"))
    assert pods[1].end(START_S) == "", cluster.text()
    assert (cluster.runs / "jobs" / cluster.jobset["metadata"]["name"] / "faults").read_text() == "1\n"
