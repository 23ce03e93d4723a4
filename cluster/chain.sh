#!/bin/bash
# Submits stages that follow each other, each to start when the one before has finished (afterok):
#   chain.sh JOB STAGE [section.key=value ...]
# With a JOB id, which trains STAGE already, the stages after it; without ("") STAGE as well. The settings go to every
# stage, but for run.start_from, which the first one keeps: a later stage starts from the run before it.
set -euo pipefail

readonly STAGES=(pt ct sft distill)
previous_job=$1 first=$2
shift 2

run_root=runs first_start=() settings=()
for setting in "$@"; do
    case $setting in
    run.name=*)
        echo "chain: $setting: the stages of a chain are named pt_14b to distill_14b, as each starts from the one before;" \
            "set run.root for another place" >&2
        exit 2
        ;;
    run.start_from=*) first_start=("$setting") ;;
    run.root=*)
        run_root=${setting#run.root=}
        run_root=${run_root//[\"\']/}
        settings+=("$setting")
        ;;
    *) settings+=("$setting") ;;
    esac
done
read -ra options <<<"${CHAIN_OPTIONS:-}"

previous="" has_begun=0
for stage in "${STAGES[@]}"; do
    if [[ $stage == "$first" ]]; then
        has_begun=1
        previous=$stage
        [[ -z $previous_job ]] || continue
        start=("${first_start[@]}")
    elif ((has_begun)); then
        start=("run.start_from=$run_root/${previous}_14b")
        previous=$stage
    else
        continue
    fi
    dependency=()
    # A stage whose predecessor failed would otherwise stay in the queue for ever.
    [[ -z $previous_job ]] || dependency=("--dependency=afterok:$previous_job" --kill-on-invalid-dep=yes)
    # CONFIG names the file of one stage; a chain uses the stages' own.
    previous_job=$(env -u CONFIG CHAIN=0 sbatch --parsable "${options[@]}" "${dependency[@]}" "cluster/$stage.sbatch" \
        "${settings[@]}" "${start[@]}")
    previous_job=${previous_job%%;*} # a cluster's name may follow
    echo "chain: $stage is job $previous_job${dependency[0]:+ (${dependency[0]#--})}"
done
