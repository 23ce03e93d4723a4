"""launch.sh and chain.sh with stand-ins for Slurm's commands, which record how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STAGES = {"pt": "pretrain.py", "ct": "continue_train.py", "sft": "sft.py", "distill": "distill.py"}
# OUTCOME is the trainer's exit code; without it the trainer crashed.
SRUN = """
printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
if [[ " $* " != *" cluster.node "* ]]; then
    mkdir -p "$LOG_ROOT/17/0/preflight"
    [[ -z ${BAD_NODES:-} ]] || echo "$BAD_NODES" >"$LOG_ROOT/17/0/preflight/bad_nodes"
    exit "${PREFLIGHT_CODE:-0}"
fi
[[ -z ${OUTCOME:-} ]] || echo "$OUTCOME" >"$BITDANCE_EXIT_RECORD"
[[ ${OUTCOME:-} == 0 ]]
"""
SCONTROL = """
case $1 in
show)
    case $2 in
    hostnames) printf 'n0\\nn1\\n' ;;
    node) echo "NodeName=$4 NodeAddr=10.0.0.1 State=ALLOCATED" ;;
    job) echo "JobId=17 ${STATE:-JobState=RUNNING Reason=None} ExcNodeList=${EXCLUDED:-(null)} Requeue=1" ;;
    esac
    ;;
*) echo "$*" >>"$CALLS" ;;
esac
"""
SBATCH = """
printf '%s|' "$@" >>"$CALLS"; echo "CHAIN=$CHAIN" >>"$CALLS"
echo $((100 + $(wc -l <"$CALLS")))
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs a script with the stand-ins first on PATH; returns (exit code, output, calls)."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (commands / name).write_text(f"#!/bin/bash\n{body}")
        (commands / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*command: str, **variables: str) -> tuple[int, str, list[str]]:
        calls.write_text("")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NCCL"))}
        environment = inherited | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "LOG_ROOT": str(tmp_path / "logs"),
        }
        done = subprocess.run(
            ["bash", *command],
            cwd=ROOT,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, calls.read_text().splitlines()

    return run


JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "96",
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_starts_its_entry_point_with_its_settings(slurm, stage):
    code, printed, calls = slurm(f"cluster/{stage}.sbatch", "run.steps=3", "data.shards=['a b']", OUTCOME="0", **JOB)
    assert code == 0, printed
    preflight, train = calls
    assert "|--nodes|n0|n1|--head|10.0.0.1|--port|20018|--gpus|8|--procs|8|" in preflight
    assert preflight.endswith(f"|--config|{stage}_14b|run.steps=3|data.shards=['a b']|")
    assert "--nodes=2|--ntasks=2|--ntasks-per-node=1|--cpus-per-task=96|" in train
    assert "|.venv/bin/python|-m|cluster.node|--nodes|2|--procs|8|--head|10.0.0.1|--port|20017|--id|17.0|" in train
    entry = f"|--|pipelines/{STAGES[stage]}|{stage}_14b|"
    assert entry in train and train.endswith("|run.steps=3|data.shards=['a b']|")
    # Only its configuration says where a stage starts.
    assert "run.start_from" not in train


@pytest.mark.parametrize(
    ("recipe", "entry_point", "default", "other"),
    [
        ("imagenet", "imagenet.py", "imagenet_b_4x", "imagenet_h_1x"),
        ("tokenizer", "train_tokenizer.py", "ae_d16c32", "ae_d32c128_gan"),
    ],
)
def test_what_is_no_stage_has_a_recipe_and_no_later_stage(slurm, recipe, entry_point, default, other):
    _, _, calls = slurm(f"cluster/{recipe}.sbatch", "run.steps=3", OUTCOME="0", **JOB)
    assert ("|--config|" in calls[0]) == (recipe != "tokenizer")
    assert f"|--|pipelines/{entry_point}|{default}|" in calls[-1] and calls[-1].endswith("|run.steps=3|")
    _, _, calls = slurm(f"cluster/{recipe}.sbatch", OUTCOME="0", CONFIG=other, **JOB)
    assert f"|--|pipelines/{entry_point}|{other}|" in calls[-1]
    code, printed, calls = slurm(f"cluster/{recipe}.sbatch", CHAIN="1")
    assert code == 2 and calls == [] and f"no stage follows {recipe}: submit it without CHAIN=1" in printed


def test_container_takes_the_place_of_the_environment(slurm):
    variables = {"CONTAINER": "train.sqsh", "CONTAINER_MOUNTS": "/data:/data", "OUTCOME": "0"}
    _, _, calls = slurm("cluster/pt.sbatch", **variables, **JOB)
    for call in calls:
        assert (
            f"|--container-image=train.sqsh|--container-workdir={ROOT}|--container-env=PYTHONPATH|--container-mounts={ROOT}:{ROOT},"
            in call
        )
        assert ",/data:/data|" in call and "|python3|-m|cluster." in call


@pytest.mark.parametrize(
    ("variables", "code", "is_requeued", "message"),
    [
        ({"OUTCOME": "0"}, 0, False, "the run is complete"),
        ({"OUTCOME": "2"}, 2, False, "refused: see"),
        ({"OUTCOME": "75"}, 75, True, "stopped on request and saved; requeued"),
        ({}, 75, True, "fault 1 of 2 allowed (no exit code of the trainer, its launcher's 1"),
        ({"MAX_FAULTS": "0"}, 1, False, "gave up at fault 1, 0 allowed"),
        ({"OUTCOME": "75", "STATE": "JobState=COMPLETING Reason=None"}, 75, False, "not requeued from here"),
        ({"OUTCOME": "75", "STATE": "JobState=COMPLETING Reason=TimeLimit"}, 75, True, "requeued"),
        ({"PREFLIGHT_CODE": "1"}, 3, False, "pre-flight: n0 wrote no verdict"),
        ({"SLURM_GPUS_ON_NODE": ""}, 2, False, "set PROCS_PER_NODE"),
    ],
)
def test_end_of_the_trainer_decides(slurm, variables, code, is_requeued, message):
    found, printed, calls = slurm("cluster/pt.sbatch", **(JOB | variables))
    assert found == code, printed
    assert ("requeue 17" in calls) is is_requeued and message in printed


@pytest.mark.parametrize(("excluded", "expected"), [("", "n1"), ("n7,n8", "n1,n7,n8")])
def test_job_goes_on_without_its_bad_node(slurm, excluded, expected):
    code, printed, calls = slurm("cluster/pt.sbatch", PREFLIGHT_CODE="1", BAD_NODES="n1", EXCLUDED=excluded, **JOB)
    assert code == 75 and calls[-2:] == ["requeue 17", f"update JobId=17 ExcNodeList={expected}"], printed
    assert not any("cluster.node" in call for call in calls)


def test_faults_are_counted_over_starts_and_forgiven_by_a_stop(slurm):
    codes = []
    for start, outcome in enumerate(["", "", "75", "", "", ""]):
        codes.append(slurm("cluster/pt.sbatch", OUTCOME=outcome, SLURM_RESTART_COUNT=str(start), **JOB)[0])
    assert codes == [75, 75, 75, 75, 75, 1]


def test_chain_submits_the_stages_in_order(slurm):
    variables = {"CHAIN": "1", "CHAIN_OPTIONS": "--account=art --nodes=32"}
    settings = ("run.root='/big runs'", "run.start_from=imported", "run.seed=2")
    code, printed, calls = slurm("cluster/pt.sbatch", *settings, **variables)
    assert code == 0, printed
    always = "--parsable|--account=art|--nodes=32|"
    after = "--dependency=afterok:{}|--kill-on-invalid-dep=yes|"
    shared = "run.root='/big runs'|run.seed=2|"
    assert calls == [
        f"{always}cluster/pt.sbatch|{shared}run.start_from=imported|CHAIN=0",
        f"{always}{after.format(101)}cluster/ct.sbatch|{shared}run.start_from=/big runs/pt_14b|CHAIN=0",
        f"{always}{after.format(102)}cluster/sft.sbatch|{shared}run.start_from=/big runs/ct_14b|CHAIN=0",
        f"{always}{after.format(103)}cluster/distill.sbatch|{shared}run.start_from=/big runs/sft_14b|CHAIN=0",
    ]


def test_chain_inside_a_job_submits_what_follows_once(slurm):
    for restart, num_submitted in (("0", 2), ("1", 0)):
        _, _, calls = slurm("cluster/ct.sbatch", CHAIN="1", OUTCOME="0", SLURM_RESTART_COUNT=restart, **JOB)
        submitted = [call for call in calls if "cluster/" in call]
        assert len(submitted) == num_submitted
        if submitted:
            # Its configuration says where a run starts, unless run.root moves the runs.
            assert "--dependency=afterok:17|" in submitted[0] and "run.start_from" not in submitted[0]


def test_chain_takes_the_files_of_a_folder(slurm, tmp_path):
    for stage in ("sft", "distill"):
        (tmp_path / f"{stage}_14b.toml").touch()
    code, printed, calls = slurm("cluster/ct.sbatch", CHAIN="1", CONFIG_ROOT=str(tmp_path))
    assert code == 2 and calls == [] and f"there is no {tmp_path}/ct_14b.toml" in printed
    code, printed, calls = slurm("cluster/sft.sbatch", CHAIN="1", CONFIG_ROOT=str(tmp_path))
    assert code == 0 and len(calls) == 2, printed
    _, _, calls = slurm("cluster/sft.sbatch", OUTCOME="0", CONFIG_ROOT=str(tmp_path), **JOB)
    assert f"pipelines/sft.py|{tmp_path}/sft_14b.toml|" in calls[-1]


def test_one_stage_takes_a_configuration_of_its_own(slurm, tmp_path):
    variables = {"CONFIG": "pt_0p6b", "CONFIG_ROOT": str(tmp_path), "OUTCOME": "0"}
    _, _, calls = slurm("cluster/pt.sbatch", **variables, **JOB)
    assert "|pipelines/pretrain.py|pt_0p6b|" in calls[-1]


@pytest.mark.parametrize("job", [{}, JOB])
def test_chain_refuses_the_configuration_of_one_stage(slurm, job):
    code, printed, calls = slurm("cluster/pt.sbatch", CHAIN="1", CONFIG="own.toml", **job)
    assert code == 2 and calls == [] and "CONFIG=own.toml" in printed and "CONFIG_ROOT" in printed


def test_chain_refuses_one_name_for_all(slurm):
    code, printed, calls = slurm("cluster/pt.sbatch", "run.name=mine", CHAIN="1")
    assert code == 2 and calls == [] and "run.name=mine" in printed


def test_outside_a_job_it_says_how_to_submit(slurm):
    code, printed, calls = slurm("cluster/sft.sbatch")
    assert code == 2 and calls == [] and "sbatch cluster/sft.sbatch" in printed
