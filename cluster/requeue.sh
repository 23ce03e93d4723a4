# shellcheck shell=bash
# Ends a job whose run is not complete; sourced by launch.sh. The functions that end it do not return.
: "${job_logs:?set by launch.sh}" "${logs:?}" "${BITDANCE_EXIT_RECORD:?}" "${EXIT_REQUEUE:?}" "${EXIT_BAD_NODE:?}" "${REPEAT_S:?}"
readonly ALLOWED_FAULTS=${MAX_FAULTS:-2}

# Asks Slurm's controller, and again if it does not answer: it is busy when many jobs end at once.
ask_slurm() {
    local try
    for try in 1 2 3 4 5 6; do
        # A requeue sends SIGTERM to this script and its children; scontrol must still report its result.
        if (trap '' TERM USR1 && exec scontrol "$@"); then return; fi
        ((try == 6)) || sleep "$REPEAT_S"
    done
    return 1
}

# Puts the job back into the queue, unless somebody cancelled it or Slurm has already requeued it.
requeue() { # reason, nodes to exclude
    local job excluded=${2:-}
    if ! job=$(ask_slurm show job -o "$SLURM_JOB_ID"); then
        say "$1; not requeued, because Slurm does not answer: submit again to continue" >&2
    elif [[ ! $job =~ " JobState=RUNNING " && ! $job =~ " Reason=TimeLimit " ]]; then
        say "$1; not requeued from here: the job was cancelled, or Slurm requeued it"
    elif ! ask_slurm requeue "$SLURM_JOB_ID"; then
        say "$1; not requeued, because Slurm refused (JobRequeue in slurm.conf?): submit again to continue" >&2
    else
        say "$1; requeued, continues from the last checkpoint"
        if [[ -n $excluded ]]; then
            # Slurm accepts this for a waiting job only. Nodes that the user excluded stay excluded.
            [[ $job =~ " ExcNodeList="([^ ]+) && ${BASH_REMATCH[1]} != "(null)" ]] && excluded+=,${BASH_REMATCH[1]}
            ask_slurm update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded" && say "excluded from now on: $excluded"
        fi
    fi
    exit "$EXIT_REQUEUE"
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

# A fault may come from a node or the network, so the job tries again a limited number of times between checkpoints.
end_by_fault() { # what, exit code after the last one, nodes to exclude
    local faults
    forget_faults_after_progress
    faults=$(($(cat "$job_logs/faults" 2>/dev/null || echo 0) + 1))
    echo "$faults" >"$job_logs/faults"
    ((faults > ALLOWED_FAULTS)) || requeue "fault $faults of $ALLOWED_FAULTS allowed ($1; see $logs/*.log)" "${3:-}"
    say "gave up at fault $faults, $ALLOWED_FAULTS allowed ($1; see $logs/*.log)" >&2
    exit "$2"
}

# Tries again without the bad nodes, unless so many are bad that the cause lies elsewhere.
end_by_bad_nodes() {
    local bad
    bad=$(cat "$logs/preflight/bad_nodes" 2>/dev/null || true)
    [[ -n $bad ]] || exit "$EXIT_BAD_NODE"
    end_by_fault "bad nodes $bad" "$EXIT_BAD_NODE" "$bad"
}
