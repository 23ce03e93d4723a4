# shellcheck shell=bash
# How a Slurm job is started again, or ends; sourced by launch.sh after start.sh.
: "${EXIT_REQUEUE:?set by start.sh}" "${REPEAT_S:?}"

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
start_again() { # reason, nodes to exclude
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

give_up() { # exit code
    exit "$1"
}
