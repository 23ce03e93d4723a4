#!/bin/bash
# Submits a chain of stages; each starts when the one before it has finished (afterok):
#   chain.sh JOB STAGE [section.key=value ...]
# JOB is the id of the job that already trains STAGE: only the later stages are submitted. If it is empty, STAGE is
# submitted too. The settings go to every stage, except run.start_from, which only the first one gets: a later stage
# starts from the run before it, which its configuration names, or which lies under the run.root in the settings.
set -euo pipefail

stages=(pt ct sft distill)
previous_job=$1 first=$2
shift 2
if [[ " ${stages[*]} " != *" $first "* ]]; then
    echo "chain: no stage follows $first: submit it without CHAIN=1" >&2
    exit 2
fi
while [[ ${stages[0]} != "$first" ]]; do stages=("${stages[@]:1}"); done

if [[ -n ${CONFIG:-} ]]; then
    echo "chain: CONFIG=$CONFIG is the configuration of one stage: put one file per stage, pt_14b.toml to" \
        "distill_14b.toml, into a folder and set CONFIG_ROOT to it" >&2
    exit 2
fi
run_root="" first_start=() settings=()
for setting in "$@"; do
    case $setting in
    run.name=*)
        echo "chain: $setting: each stage starts from the run before it, so the runs keep their names, pt_14b to" \
            "distill_14b; set run.root to keep them apart from other runs" >&2
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

# A file that is missing is found now and not when a later job starts.
if [[ -n ${CONFIG_ROOT:-} ]]; then
    for stage in "${stages[@]}"; do
        if [[ ! -f $CONFIG_ROOT/${stage}_14b.toml ]]; then
            echo "chain: there is no $CONFIG_ROOT/${stage}_14b.toml: CONFIG_ROOT needs a file for every stage of the" \
                "chain" >&2
            exit 2
        fi
    done
fi

previous=""
for stage in "${stages[@]}"; do
    start=("${first_start[@]}")
    # The configuration of a later stage says where it starts, unless run.root moves the runs.
    [[ -z $previous ]] || start=(${run_root:+"run.start_from=$run_root/${previous}_14b"})
    previous=$stage
    # The calling job already trains the first stage.
    [[ $stage != "$first" || -z $previous_job ]] || continue
    dependency=()
    # Without the second option, a stage whose predecessor failed would wait in the queue for ever.
    [[ -z $previous_job ]] || dependency=("--dependency=afterok:$previous_job" --kill-on-invalid-dep=yes)
    previous_job=$(CHAIN=0 sbatch --parsable "${options[@]}" "${dependency[@]}" "cluster/$stage.sbatch" \
        "${settings[@]}" "${start[@]}")
    previous_job=${previous_job%%;*} # the cluster's name may follow the id
    echo "chain: $stage is job $previous_job${dependency[0]:+ (${dependency[0]#--})}"
done
