#!/bin/sh
# Run a command beside a SLURM of its own: one node, this machine, with one pretended GPU. Installs Debian's SLURM if need
# be. Exit code 77, with the reason, where that cannot be.
#     sh tests/slurm.sh .venv/bin/python -m pytest -m slurm tests/test_slurm.py
set -eu

skip() { echo "SLURM is not tested here: $1" >&2; exit 77; }

[ "$(id -u)" = 0 ] || skip "it takes root to install and start it"
if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
  command -v apt-get >/dev/null || skip "there is no apt-get to install it with"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    munge slurmctld slurmd slurm-client; } >/dev/null 2>&1 || skip "apt-get cannot install munge, slurmctld and slurmd"
fi

# Jobs ask for /etc/slurm: the environment that names another place does not reach them.
[ ! -e /etc/slurm/slurm.conf ] || skip "this machine has a SLURM of its own"

folder=$(mktemp -d /tmp/wsipipe-slurm-XXXXXX)
chmod 755 "$folder"
host=$(hostname -s)
cat > "$folder/slurm.conf" <<CONF
ClusterName=wsipipe
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024)) Gres=gpu:1
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
echo "NodeName=$host Name=gpu File=/dev/null" > "$folder/gres.conf"
mkdir "$folder/state" "$folder/spool"
dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 2>/dev/null
chmod 400 "$folder/munge.key"

end() {
  for daemon in slurmd slurmctld munged; do
    if [ -s "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true; fi
  done
  sleep 1
  rm -rf "$folder" /etc/slurm/slurm.conf /etc/slurm/gres.conf
}
trap end EXIT

mkdir -p /etc/slurm
cp "$folder/slurm.conf" "$folder/gres.conf" /etc/slurm/
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" || skip "munged does not start"
slurmctld || skip "slurmctld does not start"
slurmd || skip "slurmd does not start"
for _ in $(seq 60); do
  if sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then break; fi
  sleep 1
done
if ! sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then
  tail -n 5 "$folder"/*.log >&2
  skip "the node does not come up"
fi
sinfo --Node --long
status=0
"$@" || status=$?
exit $status
