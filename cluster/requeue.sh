# shellcheck shell=bash
# How a job ends that is not complete; sourced by launch.sh. The functions do not return.
: "${job_logs:?set by launch.sh}" "${logs:?}" "${EXIT_REQUEUE:?}" "${EXIT_BAD_NODE:?}" "${REPEAT_S:?}"
readonly ALLOWED_FAULTS=${MAX_FAULTS:-2}

# Asks Slurm's controller, which may be busy when many jobs end at once.
ask_slurm() {
    local try
    for try in 1 2 3 4 5 6; do
        # A requeue ends this script and all it has started by SIGTERM, which must not take the answer away.
        if (trap '' TERM USR1 && exec scontrol "$@"); then return; fi
        ((try == 6)) || sleep "$REPEAT_S"
    done
    return 1
}

# Puts the job back into the queue, unless somebody has cancelled it or Slurm has requeued it itself.
requeue() { # why, nodes to keep away from
    local job excluded=${2:-}
    if ! job=$(ask_slurm show job -o "$SLURM_JOB_ID"); then
        say "$1; Slurm does not answer, so the job is not requeued: submit again to go on" >&2
    elif [[ ! $job =~ " JobState=RUNNING " && ! $job =~ " Reason=TimeLimit " ]]; then
        say "$1; not requeued from here: the job is not running any more, cancelled or requeued by Slurm"
    elif ! ask_slurm requeue "$SLURM_JOB_ID"; then
        say "$1; Slurm refused to requeue (JobRequeue in slurm.conf?): submit again to go on" >&2
    else
        say "$1; requeued, goes on from the last checkpoint"
        if [[ -n $excluded ]]; then
            # Slurm takes this of a waiting job only. What the user has excluded stays so.
            [[ $job =~ " ExcNodeList="([^ ]+) && ${BASH_REMATCH[1]} != "(null)" ]] && excluded+=,${BASH_REMATCH[1]}
            ask_slurm update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded" && say "from now on without $excluded"
        fi
    fi
    exit "$EXIT_REQUEUE"
}

# A fault may be of a node or the network, so the job tries again, but not for ever.
end_by_fault() { # what, exit code when it was the last, nodes to keep away from
    local faults
    faults=$(($(cat "$job_logs/faults" 2>/dev/null || echo 0) + 1))
    echo "$faults" >"$job_logs/faults"
    ((faults > ALLOWED_FAULTS)) || requeue "fault $faults of $ALLOWED_FAULTS that are allowed ($1; see $logs/*.log)" "${3:-}"
    say "failed for good after $faults faults ($1; see $logs/*.log)" >&2
    exit "$2"
}

# Tries again without the bad nodes, if they are few enough to be at fault themselves.
end_by_bad_nodes() {
    local bad
    bad=$(cat "$logs/preflight/bad_nodes" 2>/dev/null || true)
    [[ -n $bad ]] || exit "$EXIT_BAD_NODE"
    end_by_fault "bad nodes $bad" "$EXIT_BAD_NODE" "$bad"
}
