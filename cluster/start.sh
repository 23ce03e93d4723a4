# shellcheck shell=bash
# One start of a job, whatever launched it; sourced by launch.sh (Slurm) and each_node.sh (Kubernetes, SkyPilot).
# They define two functions that do not return: `start_again REASON [BAD_NODES]` has the job started again, and
# `give_up CODE` ends it for good.

# shellcheck disable=SC2034 # EXIT_REFUSED is for those who source this
readonly EXIT_REFUSED=2 EXIT_BAD_NODE=3 EXIT_REQUEUE=75 EXIT_HUNG=76
readonly REPEAT_S=10 # between two requests to stop
readonly ALLOWED_FAULTS=${MAX_FAULTS:-2}

say() { echo "$(date '+%F %T') launch: $*"; }

# Sets config: CONFIG, or the file of this stage in CONFIG_ROOT, or the one that comes with the package.
choose_config() { # stage
    config=${1}_14b
    [[ -z ${CONFIG_ROOT:-} ]] || config=$CONFIG_ROOT/$config.toml
    config=${CONFIG:-$config}
}

# Set by those who source this.
job_logs="" logs="" # folder of the job, and of this start
stage="" config="" python="" head="" port=0 num_gpus=0 num_procs=0 nodes=()
on_nodes=() # the command that runs another on all nodes; nothing: on this one

# Starts a command that ignores requests to stop until it installs handlers of its own. Requests are repeated.
# shellcheck disable=SC2016,SC2034 # the inner shell expands it; launch.sh uses it too
readonly deaf_at_first=(sh -c 'trap "" USR1 TERM; exec "$@"' sh)

is_stop_asked=0
trap 'is_stop_asked=1' USR1 TERM

# Whether a step must be ended, as other nodes have ended long ago; srun sees to it by itself.
is_overdue() { false; }

# Runs a command on the nodes, forwards a request to stop, waits for the end and sets step_code.
run_step() {
    local step timer
    "${on_nodes[@]}" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        ! is_overdue || end_step "$step"
        sleep "$REPEAT_S" &
        timer=$!
        wait -n "$step" "$timer" || true
        kill "$timer" 2>/dev/null || true
        # Not at once, as the command may not even ignore it yet. Repeated, because it may come before the tasks listen.
        ((is_stop_asked == 0)) || kill -USR1 "$step" 2>/dev/null || true
    done
    step_code=0
    wait "$step" || step_code=$?
}

# Ends a node's torchrun and its ranks, which takes two SIGINT more than a second apart (cli/launch.py).
end_step() { # process
    kill -INT "$1" 2>/dev/null || true
    sleep 2
    kill -INT "$1" 2>/dev/null || true
}

# Checks the nodes; it ends the start if a stop was asked for, and sets step_code to 0 if all nodes are good.
run_preflight() { # options of the launcher for cluster.preflight, --, settings of the run
    local options=() limits
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    read -ra limits <<<"${PREFLIGHT_OPTIONS:-}"
    # Tokenizers have settings of their own, and nothing of theirs is compiled.
    [[ $stage == tokenizer ]] || limits+=(--config "$config" "$@")
    run_step "$python" -m cluster.preflight "$logs/preflight" --nodes "${nodes[@]}" --head "$head" \
        --port "$((port + 1))" --gpus "$num_gpus" --procs "$num_procs" "${options[@]}" "${limits[@]}"
    ((is_stop_asked == 0)) || start_again "stopped on request during the pre-flight"
}

# Trains. A request to stop while Python starts would kill it, and an end without an exit code counts as a fault.
run_trainer() { # arguments of cluster.node
    run_step "${deaf_at_first[@]}" "$python" -m cluster.node "$@"
}

say_verdict() {
    cat "$logs/preflight/verdict.txt" 2>/dev/null ||
        say "pre-flight: ${nodes[0]} wrote no verdict: it must start Python and write to $logs; see $logs/0-*.log" >&2
}

# Forgets earlier faults if this start has committed a newer checkpoint than all before it: the run gets on.
forget_faults_after_progress() {
    local step known
    step=$(cat "$BITDANCE_EXIT_RECORD.step" 2>/dev/null || true)
    known=$(cat "$job_logs/step" 2>/dev/null || echo -1)
    if [[ $step =~ ^[0-9]+$ ]] && ((step > known)); then
        echo "$step" >"$job_logs/step"
        rm -f "$job_logs/faults"
    fi
}

# Counts a fault since the last request to stop or new checkpoint and sets faults; false if there were too many.
count_fault() {
    forget_faults_after_progress
    faults=$(($(cat "$job_logs/faults" 2>/dev/null || echo 0) + 1))
    echo "$faults" >"$job_logs/faults"
    ((faults <= ALLOWED_FAULTS))
}

# A fault may come from a node or the network, so the job tries again a limited number of times between checkpoints.
end_by_fault() { # what, exit code after the last one, nodes to exclude
    if count_fault; then
        start_again "fault $faults of $ALLOWED_FAULTS allowed ($1; see $logs/*.log)" "${3:-}"
    fi
    say "gave up at fault $faults, $ALLOWED_FAULTS allowed ($1; see $logs/*.log)" >&2
    give_up "$2"
}

# Tries again without the bad nodes, unless so many are bad that the cause lies elsewhere.
end_by_bad_nodes() {
    local bad
    bad=$(cat "$logs/preflight/bad_nodes" 2>/dev/null || true)
    [[ -n $bad ]] || give_up "$EXIT_BAD_NODE"
    end_by_fault "bad nodes $bad" "$EXIT_BAD_NODE" "$bad"
}

# Ends as the trainer's exit code says; the last command's is step_code.
end_by_outcome() {
    local outcome
    outcome=$(cat "$BITDANCE_EXIT_RECORD" 2>/dev/null || echo "no exit code of the trainer, its launcher's $step_code")
    case $outcome in
    0)
        say "the run is complete"
        give_up 0
        ;;
    "$EXIT_REQUEUE")
        rm -f "$job_logs/faults"
        start_again "stopped on request and saved"
        ;;
    "$EXIT_HUNG")
        cat "$BITDANCE_EXIT_RECORD.refusal" 2>/dev/null || true
        end_by_fault "a rank hung" "$EXIT_HUNG"
        ;;
    "$EXIT_REFUSED")
        say "refused: see $logs/0-*.log" >&2
        give_up "$EXIT_REFUSED"
        ;;
    esac
    end_by_fault "$outcome" 1
}
