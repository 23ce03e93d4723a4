#!/bin/bash
# Submits stages that follow each other, each to start when the one before has finished (afterok):
#   chain.sh JOB STAGE [section.key=value ...]
# With a JOB id, which trains STAGE already, the stages after it; without ("") STAGE as well. The settings go to every
# stage, but for run.start_from, which the first one keeps: a later stage starts from the run before it, as its file says
# or under the run.root that is given.
set -euo pipefail

stages=(pt ct sft distill)
previous_job=$1 first=$2
shift 2
while [[ ${stages[0]} != "$first" ]]; do stages=("${stages[@]:1}"); done

if [[ -n ${CONFIG:-} ]]; then
    echo "chain: CONFIG=$CONFIG is the file of one stage: put files of your own, named pt_14b.toml to distill_14b.toml," \
        "into a folder and name it as CONFIG_ROOT" >&2
    exit 2
fi
run_root="" first_start=() settings=()
for setting in "$@"; do
    case $setting in
    run.name=*)
        echo "chain: $setting: the runs of a chain are named pt_14b to distill_14b, as each starts from the one before;" \
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

# Before the first job is submitted, and not when a later one starts.
for stage in "${stages[@]}"; do
    file=${CONFIG_ROOT:-bitdance_scale/config/files}/${stage}_14b.toml
    if [[ ! -f $file ]]; then
        echo "chain: $file is not there: CONFIG_ROOT is the folder of the files of all stages of the chain" >&2
        exit 2
    fi
done

previous=""
for stage in "${stages[@]}"; do
    start=("${first_start[@]}")
    # Their files say it, unless run.root moves the runs.
    [[ -z $previous ]] || start=(${run_root:+"run.start_from=$run_root/${previous}_14b"})
    previous=$stage
    # The job that calls this trains the first one.
    [[ $stage != "$first" || -z $previous_job ]] || continue
    dependency=()
    # A stage whose predecessor failed would otherwise stay in the queue for ever.
    [[ -z $previous_job ]] || dependency=("--dependency=afterok:$previous_job" --kill-on-invalid-dep=yes)
    previous_job=$(CHAIN=0 sbatch --parsable "${options[@]}" "${dependency[@]}" "cluster/$stage.sbatch" \
        "${settings[@]}" "${start[@]}")
    previous_job=${previous_job%%;*} # a cluster's name may follow
    echo "chain: $stage is job $previous_job${dependency[0]:+ (${dependency[0]#--})}"
done
