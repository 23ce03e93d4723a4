"""The files of cluster/kubernetes, skypilot and container: what they make of an exit code, and that they agree."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml

from bitdance_scale.train.process import EXIT_HUNG, EXIT_REFUSED, EXIT_REQUEUE
from tests.launchers.kubernetes import (
    FAIL_JOBSET,
    JOBSET,
    RESTART_UNCOUNTED,
    ROOT,
    TRAINJOB,
    container_of,
    environment,
    job_failure,
    job_of,
    jobset_action,
    read_jobset,
)

CONTAINER = ROOT / "cluster" / "container"
KILLED, LOST = 137, 255


@pytest.fixture(params=[JOBSET, TRAINJOB], ids=["jobset", "trainjob"])
def jobset(request):
    return read_jobset(request.param)


@pytest.mark.parametrize(
    ("codes", "conditions", "action"),
    [
        ([EXIT_REQUEUE], [], RESTART_UNCOUNTED),
        ([KILLED], [], RESTART_UNCOUNTED),
        # Evicted and stopped in time, evicted and killed, on a machine that does not answer any more.
        ([EXIT_REQUEUE], ["DisruptionTarget"], RESTART_UNCOUNTED),
        ([-15], ["DisruptionTarget"], RESTART_UNCOUNTED),
        ([], ["DisruptionTarget"], RESTART_UNCOUNTED),
        ([LOST], [], RESTART_UNCOUNTED),
        ([EXIT_REFUSED], [], FAIL_JOBSET),
        ([EXIT_REFUSED], ["DisruptionTarget"], FAIL_JOBSET),
        ([EXIT_HUNG], [], FAIL_JOBSET),
        # Too many faults, bad nodes, no such command.
        ([1], [], FAIL_JOBSET),
        ([3], [], FAIL_JOBSET),
        ([127], [], FAIL_JOBSET),
    ],
)
def test_exit_code_decides_whether_pods_are_replaced(jobset, codes, conditions, action):
    reason = job_failure(job_of(jobset), codes, conditions)
    assert jobset_action(jobset, reason) == action


def test_pods_find_each_other_and_have_time_to_save(jobset):
    job, name = job_of(jobset), jobset["metadata"]["name"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] > 1
    variables = environment(jobset, 1)
    num_nodes = variables.get("NUM_NODES", variables.get("PET_NNODES"))
    assert int(num_nodes) == job["completions"]
    rank = variables.get("NODE_RANK", variables.get("PET_NODE_RANK", variables["JOB_COMPLETION_INDEX"]))
    assert rank == "1" and variables["JOB"] == name and variables["NODE_NAME"] == "machine1"
    # The simulated network knows the first pod's name only as JobSet forms it.
    assert variables.get("MASTER_ADDR", variables.get("PET_MASTER_ADDR")) == "127.0.0.1"
    pod, container = job["template"]["spec"], container_of(jobset)
    (signal_s,) = re.findall(r"--signal=B:USR1@(\d+)", (ROOT / "cluster" / "pt.sbatch").read_text())
    assert pod["terminationGracePeriodSeconds"] > int(signal_s) and pod["restartPolicy"] == "Never"
    assert variables["GPUS_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]
    script, (stage, entry_point, *_) = container["command"], container["args"]
    assert script == ["bash", "cluster/each_node.sh"] and (ROOT / entry_point).is_file()
    assert (ROOT / "bitdance_scale" / "config" / "files" / f"{stage}_14b.toml").is_file()


def test_root_may_be_read_only(jobset):
    container = container_of(jobset)
    assert container["securityContext"]["readOnlyRootFilesystem"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/opt/bitdance/runs", "/dev/shm", "/tmp"}
    # The first start builds the index of the data.
    settings = dict(argument.split("=", 1) for argument in container["args"][2:])
    assert any(Path("/opt/bitdance", settings["data.index_dir"]).is_relative_to(folder) for folder in writable)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job_of(jobset)["template"]["spec"]["volumes"]}


def test_trainjob_and_jobset_differ_only_in_what_the_trainer_sets():
    plain, made = read_jobset(JOBSET), read_jobset(TRAINJOB)
    for of in (plain, made):
        variables = {entry["name"]: entry for entry in container_of(of)["env"]}
        container_of(of)["env"] = {
            name: entry
            for name, entry in variables.items()
            if not name.startswith(("PET_", "NUM_NODES", "MASTER_", "LEAVE_OUT"))
        }
        (replicated,) = of["spec"]["replicatedJobs"]
        replicated["template"].pop("metadata", None)
    assert plain["spec"] == made["spec"]


def test_skypilot_recovers_from_the_code_that_asks_for_it():
    job = yaml.safe_load((ROOT / "cluster" / "skypilot" / "job.yaml").read_text(encoding="utf-8"))
    recovery = job["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_REQUEUE] and recovery["max_restarts_on_errors"] == 0
    assert (ROOT / job["envs"]["ENTRY_POINT"]).is_file()
    # The logs, which hold the count of faults, lie on what outlives the machines.
    assert any(job["envs"]["LOG_ROOT"].startswith(f"{mount}/") for mount in job["volumes"])
    assert job["run"].splitlines()[-1].startswith('exec bash cluster/each_node.sh "$STAGE" "$ENTRY_POINT" ')


def read_dockerfile() -> dict[str, list[str]]:
    """Its instructions, by name."""
    text = re.sub(r"\\\n", "", (CONTAINER / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(re.sub(r"\s+", " ", rest))
    return found


def read_definition() -> dict[str, str]:
    """Its sections, by name."""
    parts = re.split(r"^%(\w+)\n", (CONTAINER / "bitdance.def").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_images_have_one_base_one_content_and_one_installation():
    docker, apptainer = read_dockerfile(), read_definition()
    (base,) = (argument[len("BASE=") :] for argument in docker["ARG"] if argument.startswith("BASE="))
    assert re.fullmatch(r"\S+:bookworm-\d{8}-slim", base) and f"BASE={base}\n" in apptainer["arguments"]
    sky = yaml.safe_load((ROOT / "cluster" / "skypilot" / "job.yaml").read_text(encoding="utf-8"))
    assert base.endswith(sky["resources"]["image_id"].removeprefix("docker:"))
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = dict(line.split() for line in apptainer["files"].splitlines() if line.strip())
    assert kept == set(copied) and all(path == f"/opt/bitdance/{name}" for name, path in copied.items())
    assert all((ROOT / name).exists() for name in kept)

    def steps(text: str) -> list[str]:
        return re.findall(r"install\.sh (\w+)", text)

    in_docker = [step for run in docker["RUN"] for step in steps(run)]
    assert in_docker == steps(apptainer["post"]) == steps(sky["setup"]) == ["system", "dependencies", "package"]
    # Sources come after what takes long, and nobody is root.
    assert docker["COPY"][-1].startswith(". ") and docker["USER"] == ["1000"]


def test_every_requirement_that_is_installed_has_a_version():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"$', (CONTAINER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras.split():
        lines += config["options.extras_require"][extra].splitlines()
    wanted = {re.split(r"[ <>=;\[]", line)[0].lower() for line in lines if line.strip()}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    # torch brings its own Triton.
    assert wanted - pinned == {"triton"} and "torch" in wanted
