#!/bin/bash
# Builds the image of cluster/container/Dockerfile without Docker and without a registry of images, and trains in it.
# Buildah executes the Dockerfile on a Debian 12 that debootstrap makes of the same packages as the published base. It
# takes 10 to 20 minutes and 25 GB in TMPDIR, downloads 4 GB from PyPI and Debian, and needs root on a Debian-like
# system.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ $(id -u) != 0 ]]; then
    echo "test-container: skipped: a Debian can be made by root only (sudo make test-container)"
    exit 0
fi
missing=()
for package in buildah debootstrap; do
    command -v "$package" >/dev/null || missing+=("$package")
done
if ((${#missing[@]})); then
    echo "test-container: installing ${missing[*]}"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

folder=$(mktemp -d -t container-test.XXXXXX)
readonly BASE=localhost/debian-bookworm IMAGE=localhost/bitdance
buildah() { command buildah --root "$folder/store" --runroot "$folder/run" --storage-driver overlay "$@"; }
clean_up() {
    buildah rm --all >/dev/null 2>&1 || true
    # debootstrap mounts the first two while it works.
    umount "$folder/base/proc" "$folder/base/sys" "$folder/store/overlay" 2>/dev/null || true
    rm -rf --one-file-system "$folder"
}
trap clean_up EXIT

echo "test-container: making a Debian 12"
# The mirror that this machine uses.
# shellcheck disable=SC2016 # apt expands it
mirror=$(apt-get indextargets --format '$(SITE)' 'Codename: bookworm' 'Component: main' 'Created-By: Packages' |
    head -1)
if ! debootstrap --variant=minbase bookworm "$folder/base" ${mirror:+"$mirror"} >"$folder/log" 2>&1; then
    tail "$folder/log"
    exit 1
fi
container=$(buildah from scratch)
buildah add --quiet "$container" "$folder/base" / >/dev/null
buildah commit --quiet "$container" "$BASE" >/dev/null
buildah rm "$container" >/dev/null
rm -rf --one-file-system "$folder/base"

echo "test-container: building the image"
# pip trusts whom this machine trusts.
certificates=/etc/ssl/certs/ca-certificates.crt
printf '[global]\ncert = /run/certificates\n' >"$folder/pip.conf"
buildah bud --quiet --isolation chroot --pull-never --build-arg "BASE=$BASE" --file cluster/container/Dockerfile \
    --volume "$certificates:/run/certificates:ro" --volume "$folder/pip.conf:/etc/pip.conf:ro" \
    --tag "$IMAGE" . >/dev/null
container=$(buildah from --pull-never "$IMAGE")
root=$(buildah mount "$container")
mapfile -t environment < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" |
    sed '/^$/d')
user=$(buildah inspect --format '{{.OCIv1.Config.User}}' "$container")
work=$(buildah inspect --format '{{.OCIv1.Config.WorkingDir}}' "$container")

echo "test-container: training in the image as user $user, with a root that is read-only"
mkdir "$folder/runs"
chown "$user" "$folder/runs"
cp tests/container/check_image.py "$folder/runs/"
# shellcheck disable=SC2016 # the inner shell expands it
if ! unshare --mount --pid --fork bash -euc '
    root=$1 runs=$2 user=$3 work=$4
    shift 4
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/tmp"
    mount --bind "$runs" "$root$work/runs"
    exec chroot --userspec="$user:$user" "$root" env -i "$@" bash -euc "
        cd $work
        PYTHONPATH=. python runs/check_image.py
        bitdance demo-data runs/data --images 60
        JOB=test PROCS_PER_NODE=2 CONFIG=demo OMP_NUM_THREADS=1 bash cluster/each_node.sh pt pipelines/pretrain.py \
            data.shards=[\\\"runs/data\\\"] run.steps=4 model.num_layers=2 data.global_batch=10 evaluate.shards=[] \
            evaluate.benchmarks=[] sample.every_steps=0 observe.wandb_mode=disabled
        "' - "$root" "$folder/runs" "$user" "$work" "${environment[@]}" >"$folder/log" 2>&1; then
    tail -n 60 "$folder/log"
    exit 1
fi
grep "image:" "$folder/log"
[[ $(cat "$folder/runs/jobs/test/0/decision") == 0 ]]
find "$folder/runs/demo/checkpoints" -maxdepth 1 -name 'step_*' | grep -q step_00000004
echo "test-container: passed"
