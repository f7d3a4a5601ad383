#!/bin/sh
# A SLURM for the tests, with two nodes on this machine: local_slurm.sh start|stop FOLDER
# It runs as root and needs the packages slurm-wlm and munge of Debian or Ubuntu. FOLDER gets the
# configuration, state and logs. After `export SLURM_CONF=FOLDER/slurm.conf` all of SLURM's commands
# work. It keeps no accounts, like many small clusters.
set -eu

usage() { echo "usage: local_slurm.sh start|stop FOLDER" >&2; exit 2; }
[ $# -eq 2 ] || usage
mkdir -p "$2"
FOLDER=$(cd "$2" && pwd)
export SLURM_CONF="$FOLDER/slurm.conf"

start() {
    host=$(hostname -s)
    # In MiB: four fifths of the free memory, half for each node.
    memory=$(awk '/MemAvailable/ {print int($2 / 2560)}' /proc/meminfo)
    mkdir -p "$FOLDER/state" "$FOLDER/logs"
    cat >"$SLURM_CONF" <<CONF
ClusterName=moco-test
SlurmctldHost=$host(127.0.0.1)
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=16818 CPUs=4 RealMemory=$memory
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 Port=16819 CPUs=4 RealMemory=$memory
PartitionName=test Nodes=$host,localhost Default=YES MaxTime=INFINITE

# Everything runs as root. Tasks are known by their parents, because there may be no cgroups here.
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU,CR_PACK_NODES
MailProg=/bin/true

# The nodes have this number of CPUs on every machine. Jobs fill the first node first.
SlurmdParameters=config_overrides

# Jobs may be requeued, and start soon.
JobRequeue=1
KillWait=30
ReturnToService=2
SchedulerParameters=sched_min_interval=100000,bf_interval=5

StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/%n.pid
SlurmctldLogFile=$FOLDER/logs/slurmctld.log
SlurmdLogFile=$FOLDER/logs/%n.log
CONF
    start_munge
    slurmctld
    for node in "$host" localhost; do slurmd -N "$node"; done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" = 2 ] && return
        sleep 0.5
    done
    echo "the nodes are not idle after 30 seconds; see $FOLDER/logs" >&2
    exit 1
}

# SLURM's programs identify themselves to each other through munge.
start_munge() {
    munge --no-input >/dev/null 2>&1 && return
    mkdir -p /run/munge
    chown munge: /run/munge
    su -s /bin/sh munge -c munged
}

stop() {
    scancel --quiet --user=root 2>/dev/null || true
    for name in "$(hostname -s)" localhost slurmctld; do
        [ -f "$FOLDER/$name.pid" ] || continue
        pid=$(cat "$FOLDER/$name.pid")
        kill "$pid" 2>/dev/null || true
        while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    done
}

case $1 in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
