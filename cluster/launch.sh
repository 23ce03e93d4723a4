#!/bin/bash
# Trains one stage on the nodes of a Slurm job: pre-flight, torchrun on every node, requeue after a requested stop.
# The .sbatch files call it as `launch.sh STAGE ENTRY_POINT [section.key=value ...]`; docs/cluster.md explains it.
#
# Variables, all optional; sbatch passes them on from the shell that submits:
#   CONFIG             configuration of this stage: a file, or the name of one that comes with the package [STAGE_14b]
#   CONFIG_ROOT        folder of your own configurations, pt_14b.toml to distill_14b.toml [those of the package]
#   VENV               virtual environment on the shared file system [.venv]
#   CONTAINER          image for pyxis/enroot, used instead of VENV
#   CONTAINER_MOUNTS   mounts besides the checkout, host:container[,host:container ...]
#   PYTHON             interpreter [$VENV/bin/python; in a container python3]
#   PROCS_PER_NODE     processes per node [GPUs per node of the job]
#   MASTER_PORT        first of the six ports used on the first node [20000 + job id modulo 10000]
#   LOG_ROOT           folder for logs, on the shared file system [runs/slurm]
#   MAX_FAULTS         how often the job requeues itself after faults without a new checkpoint before it fails [2]
#   PREFLIGHT          0: start without checking the nodes [1]
#   PREFLIGHT_OPTIONS  limits of the pre-flight: `python -m cluster.preflight --help`
#   SRUN_OPTIONS       more options for srun, where a site needs them
#   CHAIN              1: also submit the later stages, each to start when the one before it has finished
#   CHAIN_OPTIONS      sbatch options for every job of a chain, such as "--account=art --nodes=32"
set -euo pipefail

readonly WAIT_S=300 # for the other nodes to end after the first one has
# Slurm signals this shell before the time limit (USR1, from the --signal line of the .sbatch) and on preemption (TERM).
# shellcheck source=cluster/start.sh
source cluster/start.sh

stage=$1 entry_point=$2
shift 2
choose_config "$stage"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    [[ ${CHAIN:-0} == 1 ]] && exec bash cluster/chain.sh "" "$stage" "$@"
    say "not inside a job: run sbatch cluster/$stage.sbatch, or CHAIN=1 bash cluster/$stage.sbatch to submit the" \
        "later stages too" >&2
    exit "$EXIT_REFUSED"
fi

restart=${SLURM_RESTART_COUNT:-0}
job_logs=$(realpath -m "${LOG_ROOT:-runs/slurm}")/$SLURM_JOB_ID
logs=$job_logs/$restart
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
num_gpus=${SLURM_GPUS_ON_NODE:-0}
num_procs=${PROCS_PER_NODE:-$num_gpus}
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
if ((num_procs == 0)); then
    say "this job has no GPUs, and PROCS_PER_NODE is not set: ask for GPUs (--gpus-per-node) or set PROCS_PER_NODE" >&2
    exit "$EXIT_REFUSED"
fi
mkdir -p "$logs"
# The trainer's first rank writes its exit code here, because torchrun turns every code but 0 into 1.
export BITDANCE_EXIT_RECORD=$logs/exit_code
# This checkout comes first: a container has no such package, and an environment may have another version.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# shellcheck source=cluster/nccl.sh
source cluster/nccl.sh
# shellcheck source=cluster/requeue.sh
source cluster/requeue.sh
# Slurm's own address of the node: the node's name may not resolve.
head=$(ask_slurm show node -o "${nodes[0]}" | grep -o ' NodeAddr=[^ ]*')
head=${head#*=}

if ((restart == 0)) && [[ ${CHAIN:-0} == 1 ]]; then
    bash cluster/chain.sh "$SLURM_JOB_ID" "$stage" "$@"
fi

on_nodes=(
    # Until it has made the step, which takes a busy controller seconds, srun does not forward signals.
    "${deaf_at_first[@]}" srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1
    # The one task of a node gets all its cores; srun does not inherit this from the job.
    --cpus-per-task="$SLURM_CPUS_ON_NODE"
    # Nodes end seconds apart. The first one must not kill the others while they still write their logs.
    --kill-on-bad-exit=0 --wait="$WAIT_S"
    --output="$logs/%n-%N.log" --open-mode=append
)
read -ra site_options <<<"${SRUN_OPTIONS:-}"
on_nodes+=("${site_options[@]}")
if [[ -n ${CONTAINER:-} ]]; then
    on_nodes+=(
        --container-image="$CONTAINER" --container-workdir="$PWD"
        # Otherwise pyxis keeps a value that the image sets.
        --container-env=PYTHONPATH
        --container-mounts="$PWD:$PWD,$job_logs:$job_logs${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    )
    python=${PYTHON:-python3}
else
    python=${PYTHON:-${VENV:-.venv}/bin/python}
fi

say "$stage, job $SLURM_JOB_ID, start $((restart + 1)): ${#nodes[@]} nodes (${SLURM_JOB_NODELIST})," \
    "$num_procs processes each; logs in $logs"

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    run_preflight -- "$@"
    say_verdict
    ((step_code == 0)) || end_by_bad_nodes
fi

run_trainer --nodes "${#nodes[@]}" --procs "$num_procs" --head "$head" --port "$port" \
    --id "$SLURM_JOB_ID.$restart" --logs "$logs" -- "$entry_point" "$config" checkpoint.fall_back=true "$@"

end_by_outcome
