#!/bin/bash
# Installs the Debian packages that the tests of the launch scripts need, where they are missing; as root.
set -euo pipefail

missing=()
for package in slurmctld:slurm-wlm slurmd:slurm-wlm sbatch:slurm-wlm munged:munge mungekey:munge shellcheck:shellcheck; do
    command -v "${package%%:*}" >/dev/null || missing+=("${package##*:}")
done
if ((${#missing[@]})); then
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    echo "test-slurm: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi
