#!/bin/bash
# Starts Slurm on this machine, runs the tests of the launch scripts and stops it: run.sh PYTHON [pytest options].
# The machine plays three nodes, each with its own slurmd and all cores. It writes to a temporary folder only, except for
# the packages that apt installs, and needs neither systemd nor cgroups.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly LIMIT_S=1800 # for the tests; they take about three minutes on two free cores
readonly NODES=(n1 n2 n3)
python=$1
shift

if [[ $(id -u) != 0 ]]; then
    echo "test-slurm: skipped: Slurm's daemons start as root only (sudo make test-slurm)"
    exit 0
fi

bash tests/slurm/install.sh

shellcheck -x cluster/*.sh cluster/*.sbatch cluster/container/*.sh tests/slurm/*.sh tests/container/*.sh .ci/run

folder=$(mktemp -d -t slurm-test.XXXXXX)
chmod 755 "$folder"
export SLURM_CONF=$folder/slurm.conf

stop_daemon() { # name
    local pid
    pid=$(cat "$folder/$1.pid" 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in {1..50}; do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

stop_slurm() {
    local code=$?
    trap - EXIT
    if ((code != 0)); then
        tail -n 20 "$folder"/*.log "$folder"/munge/*.log 2>/dev/null || true
    fi
    # A failed test may have left jobs.
    squeue --noheader --format=%i 2>/dev/null | xargs --no-run-if-empty scancel --hurry 2>/dev/null || true
    for _ in {1..30}; do
        [[ -n $(squeue --noheader 2>/dev/null) ]] || break
        sleep 0.5
    done
    for node in "${NODES[@]}"; do
        stop_daemon "$node"
    done
    stop_daemon slurmctld
    stop_daemon munge/munged
    rm -rf "$folder"
    exit "$code"
}
trap stop_slurm EXIT

host=$(uname -n)
host=${host%%.*}
mapfile -t ports < <("$python" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(s.getsockname()[1] for s in sockets), sep="\n")')
memory_mib=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
nodes=$(for i in "${!NODES[@]}"; do
    echo "NodeName=${NODES[i]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i + 1]}" \
        "CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$memory_mib State=UNKNOWN"
done)

cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: two minutes by default.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
SlurmctldPort=${ports[0]}
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=15
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
# A job in the partition urgent takes nodes from one in the partition train.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$nodes
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
CONF

mkdir -p "$folder/state" "$folder/munge"
chown munge "$folder/munge"
runuser -u munge -- mungekey --create --keyfile="$folder/munge/key"
runuser -u munge -- munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" --seed-file="$folder/munge/seed"
slurmctld
for node in "${NODES[@]}"; do
    mkdir "$folder/spool.$node"
    slurmd -N "$node"
done
idle_nodes() { sinfo --noheader --partition=train --states=idle --responding --format=%D 2>/dev/null; }
for _ in {1..60}; do
    [[ $(idle_nodes) == "${#NODES[@]}" ]] && break
    sleep 0.5
done
[[ $(idle_nodes) == "${#NODES[@]}" ]] || {
    echo "test-slurm: the nodes did not become idle within 30 s" >&2
    sinfo >&2
    exit 1
}

timeout --kill-after=20 "$LIMIT_S" "$python" -m pytest -m slurm tests/slurm "$@"
