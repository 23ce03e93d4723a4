#!/bin/bash
# Trains one stage where something else starts one process per node: Kubernetes, SkyPilot. On every node, from the root
# of the checkout or in the image: `each_node.sh STAGE ENTRY_POINT [section.key=value ...]`. See docs/cluster.md.
#
# All nodes exit with one code, which the first node decides: 75 says start the job again, every other code is final.
#
# Variables. Where torchrun has one of its own (PET_...), as Kubeflow sets them, it is the default:
#   JOB                name of the job, the same at every start of it and of no other one; required
#   NUM_NODES          nodes of the job [PET_NNODES; 1]
#   NODE_RANK          number of this node, from 0 [PET_NODE_RANK; JOB_COMPLETION_INDEX; 0]
#   NODE_NAME          name of this node in messages [name of the machine]
#   MASTER_ADDR        address of the first node [PET_MASTER_ADDR; 127.0.0.1]
#   MASTER_PORT        first of seven free ports on the first node [PET_MASTER_PORT; 29500]
#   GPUS_PER_NODE      GPUs per node of the job [not counted]
#   PROCS_PER_NODE     processes per node [GPUS_PER_NODE]
#   PYTHON             interpreter [python3]
#   LOG_ROOT           folder for logs, on a file system that all nodes share and that outlives them [runs/jobs]
#   JOIN_S             seconds in which all nodes must have started [1800]
#   WAIT_S             seconds in which all nodes must have ended after the first one has [300]
#   NEW_NODES          1: the next start may get other nodes, so that bad ones count as a fault; 0: they end the job [0]
#   LEAVE_OUT          how to start the job without a node, for messages [start the job without]
#   CONFIG, CONFIG_ROOT, MAX_FAULTS, PREFLIGHT, PREFLIGHT_OPTIONS: as in launch.sh
set -euo pipefail

# shellcheck source=cluster/start.sh
source cluster/start.sh
readonly WAIT_S=${WAIT_S:-300} JOIN_S=${JOIN_S:-1800}
# What another node waits for longer than the first one, which decides.
readonly LATER_S=$((WAIT_S / 5))

stage=$1 entry_point=$2
shift 2
choose_config "$stage"
job_logs=$(realpath -m "${LOG_ROOT:-runs/jobs}")/${JOB:?the name of the job, the same at every start of it}
num_nodes=${NUM_NODES:-${PET_NNODES:-1}}
rank=${NODE_RANK:-${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}}
head=${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
num_gpus=${GPUS_PER_NODE:-0}
num_procs=${PROCS_PER_NODE:-$num_gpus}
python=${PYTHON:-python3}
if ((num_procs == 0)); then
    say "neither GPUS_PER_NODE nor PROCS_PER_NODE is set: set one of them to the ranks of a node" >&2
    exit "$EXIT_REFUSED"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# shellcheck source=cluster/nccl.sh
source cluster/nccl.sh

start_again() { # reason
    say "$1; to be started again, continues from the last checkpoint"
    give_up "$EXIT_REQUEUE"
}

# On the first node it is the decision about all.
give_up() { # exit code
    if ((rank == 0)) && [[ -n $logs ]]; then
        echo "$1" >"$logs/decision.new"
        mv "$logs/decision.new" "$logs/decision"
        touch "$logs/ended/0"
    fi
    exit "$1"
}

# Ends another node than the first one as that one decides; a start that it has not decided about is a fault.
end_as_decided() {
    local code waited
    for ((waited = 0; waited < WAIT_S + LATER_S; waited++)); do
        if code=$(cat "$logs/decision" 2>/dev/null) && [[ -n $code ]]; then
            exit "$code"
        fi
        sleep 1
    done
    say "the first node has not decided how this start ends; to be started again" >&2
    exit "$EXIT_REQUEUE"
}

# Makes the folder of this start, on the first node, and judges the start before it; sets start.
begin_start() {
    local before
    start=0
    while [[ -d $job_logs/$start ]]; do start=$((start + 1)); done
    logs=$job_logs/$start
    mkdir -p "$logs/ended"
    ((start > 0)) || return 0
    before=$(cat "$job_logs/$((start - 1))/decision" 2>/dev/null || true)
    if [[ -n $before && $before != "$EXIT_REQUEUE" ]]; then
        # It was final, so somebody has started the job again.
        rm -f "$job_logs/faults"
    elif [[ -z $before ]]; then
        # The machine was lost, or killed this script.
        if ! BITDANCE_EXIT_RECORD=$job_logs/$((start - 1))/exit_code count_fault; then
            say "gave up at fault $faults, $ALLOWED_FAULTS allowed (start $start left no decision)" >&2
            echo 1 >"$logs/decision"
        fi
    fi
}

# Waits for all nodes; sets start, logs and nodes. The others learn both from the first one.
join_nodes() {
    local joined
    joined=$(mktemp)
    run_step "$python" -m cluster.join "$joined" --nodes "$num_nodes" --rank "$rank" --name "${NODE_NAME:-$(uname -n)}" \
        --head "$head" --port "$((port + 6))" --start "${start:-0}" \
        --timeout "$((rank == 0 ? JOIN_S : JOIN_S + LATER_S))"
    ((is_stop_asked == 0)) || start_again "stopped on request before all nodes had started"
    if ((step_code != 0)); then
        ((rank != 0)) || end_by_fault "not all of the $num_nodes nodes have started within $JOIN_S s" 1
        say "the first node, $head, was not reached" >&2
        exit "$EXIT_REQUEUE"
    fi
    { read -r start && mapfile -t nodes; } <"$joined"
    rm -f "$joined"
    logs=$job_logs/$start
}

is_overdue() {
    [[ -n $(ls -A "$logs/ended" 2>/dev/null) ]] || return 1
    : "${first_end_s:=$SECONDS}"
    ((SECONDS - first_end_s > WAIT_S))
}

# The first node waits for the others: their ranks may still leave an exit code.
wait_for_others() {
    local waited
    for ((waited = 0; waited < WAIT_S; waited++)); do
        if (($(find "$logs/ended" -type f | wc -l) >= num_nodes)); then return; fi
        sleep 1
    done
}

if ((rank == 0)); then begin_start; fi
join_nodes
export BITDANCE_EXIT_RECORD=$logs/exit_code
# The log of this node, which must be whole before this process ends.
exec > >(exec tee -a "$logs/$rank-${nodes[rank]}.log") 2>&1
tee_pid=$!
trap 'exec >&- 2>&-; wait "$tee_pid"' EXIT
[[ ! -s $logs/decision ]] || end_as_decided
say "$stage, job $JOB, start $((start + 1)): node $rank of $num_nodes, ${nodes[rank]}, $num_procs processes;" \
    "logs in $logs"

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    run_preflight --node-rank "$rank" --leave-out "${LEAVE_OUT:-start the job without} " -- "$@"
    ((rank == 0 || step_code == 0)) || end_as_decided
    if ((rank == 0)); then
        say_verdict
        if ((step_code != 0)); then
            [[ ${NEW_NODES:-0} != 1 ]] || end_by_bad_nodes
            give_up "$EXIT_BAD_NODE"
        fi
    fi
fi

run_trainer --nodes "$num_nodes" --procs "$num_procs" --head "$head" --port "$port" \
    --id "$JOB.$start" --logs "$logs" --node-rank "$rank" --node-name "${nodes[rank]}" \
    -- "$entry_point" "$config" checkpoint.fall_back=true "$@"

touch "$logs/ended/$rank"
((rank == 0)) || end_as_decided
wait_for_others
end_by_outcome
