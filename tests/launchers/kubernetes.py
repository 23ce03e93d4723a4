"""The part of Kubernetes, JobSet and Kubeflow Trainer that decides how a job of cluster/kubernetes runs and ends.

Pods are processes of this machine. What is decided follows the documents of each: pod failure policy and back-off limit
(kubernetes.io, "Jobs"), failure policy (jobset.sigs.k8s.io), environment of a TrainJob (kubeflow.org, "Trainer").
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
JOBSET = ROOT / "cluster" / "kubernetes" / "jobset.yaml"
TRAINJOB = ROOT / "cluster" / "kubernetes" / "trainjob.yaml"

FAIL_JOBSET = "FailJobSet"
RESTART = "RestartJobSet"
RESTART_UNCOUNTED = "RestartJobSetAndIgnoreMaxRestarts"


def read_jobset(path: Path) -> dict[str, Any]:
    """The JobSet of a file; of a file with a TrainJob, the one that Kubeflow Trainer makes of it."""
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    kinds = {document["kind"]: document for document in documents}
    return kinds["JobSet"] if "JobSet" in kinds else _of_trainjob(kinds["TrainingRuntime"], kinds["TrainJob"])


def _of_trainjob(runtime: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """What the Trainer's torch plugin makes of a runtime: numbers of pods, PET_ variables and the job's arguments."""
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    name, spec = job["metadata"]["name"], copy.deepcopy(runtime["spec"]["template"]["spec"])
    trainer = job["spec"]["trainer"]
    num_nodes = trainer.get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
    assert "torch" in runtime["spec"]["mlPolicy"]
    (replicated,) = (
        entry
        for entry in spec["replicatedJobs"]
        if entry["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    )
    replicated["template"]["spec"] |= {"completions": num_nodes, "parallelism": num_nodes}
    (container,) = (
        entry for entry in replicated["template"]["spec"]["template"]["spec"]["containers"] if entry["name"] == "node"
    )
    container |= {key: trainer[key] for key in ("command", "args") if key in trainer}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container["env"] += [
        {"name": "PET_NNODES", "value": str(num_nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": "auto"},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    return {"kind": "JobSet", "metadata": {"name": name}, "spec": spec}


def job_of(jobset: Mapping[str, Any]) -> dict[str, Any]:
    """The specification of its one Job."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def container_of(jobset: Mapping[str, Any]) -> dict[str, Any]:
    """The one container of its pods."""
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


def set_env(jobset: Mapping[str, Any], **variables: str) -> None:
    """Changes variables of the container, as its user does in the file."""
    container = container_of(jobset)
    container["env"] = [entry for entry in container["env"] if entry["name"] not in variables]
    container["env"] += [{"name": name, "value": value} for name, value in variables.items()]


def environment(jobset: Mapping[str, Any], index: int) -> dict[str, str]:
    """The variables of the pod with this completion index.

    Variables of secrets are left out. The name of a pod in the JobSet's network is replaced by this machine's address.
    """
    name = jobset["metadata"]["name"]
    fields = {
        "metadata.labels['jobset.sigs.k8s.io/jobset-name']": name,
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
        "spec.nodeName": f"machine{index}",
    }
    found = {"JOB_COMPLETION_INDEX": str(index)}
    for entry in container_of(jobset)["env"]:
        value = entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        # A reference to a variable that is defined further down stays as it is.
        value = re.sub(r"\$\(([A-Z_]+)\)", lambda match: found.get(match[1], match[0]), value)
        found[entry["name"]] = re.sub(rf"^{name}-node-0-\d+\.{name}$", "127.0.0.1", value)
    return found


class Pods:
    """The pods of one attempt of a JobSet.

    Args:
        jobset: what to run.
        root: root of the image.
        log: file for what the pods print.
    """

    def __init__(self, jobset: Mapping[str, Any], root: Path, log: Path) -> None:
        self.jobset = jobset
        self._grace_s = job_of(jobset)["template"]["spec"]["terminationGracePeriodSeconds"]
        container = container_of(jobset)
        kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS", "TMPDIR") if name in os.environ}
        # The image's environment comes first.
        kept["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("ab") as file:
            self.processes = [
                subprocess.Popen(
                    [*container["command"], *container["args"]],
                    cwd=root,
                    env=kept | environment(jobset, index),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for index in range(job_of(jobset)["completions"])
            ]

    def terminate(self, index: int) -> None:
        """The kubelet's first signal, to the container's first process alone."""
        self.processes[index].send_signal(signal.SIGTERM)

    def end(self, timeout_s: float) -> str:
        """Waits for the Job's end as its controller does; returns why it failed, or "" if it is complete.

        The first pod that fails ends the others: SIGTERM, after the grace period SIGKILL.

        Raises:
            TimeoutError: no pod has ended in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [code for code in codes if code]
            if failed:
                reason = job_failure(job_of(self.jobset), failed[:1])
                assert reason
                self._delete(deadline_s)
                return reason
            if all(code == 0 for code in codes):
                return ""
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"pods have not ended after {timeout_s} s: {codes}")
            time.sleep(0.1)

    def _delete(self, deadline_s: float) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline_s = min(deadline_s, time.monotonic() + self._grace_s)
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        self.kill()

    def kill(self) -> None:
        """Ends what is left, as a machine that is lost."""
        for process in self.processes:
            if process.poll() is None:
                # torchrun's ranks have sessions of their own; in a container they would end with its first process.
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()


def job_failure(job: Mapping[str, Any], codes: Sequence[int], conditions: Sequence[str] = ()) -> str:
    """Why a Job has failed once its pods have; "" while it makes new ones in their place.

    Args:
        job: its specification; its pods have one container.
        codes: exit codes of failed pods, those of a signal as Python gives them; none: a pod without a container.
        conditions: types of their conditions that are true.
    """
    num_failed = 0
    for code in codes or [None]:
        action = next(
            (rule["action"] for rule in job["podFailurePolicy"]["rules"] if _matches(rule, code, conditions)), "Count"
        )
        if action == "FailJob":
            return "PodFailurePolicy"
        num_failed += action == "Count"
    return "BackoffLimitExceeded" if num_failed > job["backoffLimit"] else ""


def _matches(rule: Mapping[str, Any], code: int | None, conditions: Sequence[str]) -> bool:
    if "onPodConditions" in rule:
        return any(entry["type"] in conditions for entry in rule["onPodConditions"])
    wanted = rule["onExitCodes"]
    if code is None:
        return False
    code = code if code >= 0 else 128 - code
    # Containers that ended with 0 are never looked at.
    return code != 0 and (code in wanted["values"]) is (wanted["operator"] == "In")


def jobset_action(jobset: Mapping[str, Any], reason: str, num_counted: int = 0) -> str:
    """What becomes of a JobSet after its Job has failed.

    Args:
        jobset: the JobSet.
        reason: why the Job failed.
        num_counted: restarts so far that count.
    """
    policy = jobset["spec"]["failurePolicy"]
    for rule in policy["rules"]:
        if reason in rule.get("onJobFailureReasons", [reason]):
            action = rule["action"]
            break
    else:
        action = RESTART
    return FAIL_JOBSET if action == RESTART and num_counted >= policy["maxRestarts"] else action
