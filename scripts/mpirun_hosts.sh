#!/usr/bin/env bash
# A run over several hosts without Slurm: mpirun and a file of hosts. NOT YET RUN ON A GPU, nor on more than one host.
#
#   scripts/mpirun_hosts.sh HOSTFILE COMMAND...
#   scripts/mpirun_hosts.sh hosts.txt ./train_gpt2 --recipe modern --train "/data/fw/*_train_*.bin" --val "/data/fw/*_val_*.bin" --out /shared/runs/modern
#
# HOSTFILE, one line a host: `node1 slots=8`; slots is the number of GPUs, and of ranks started there; 8 if not said.
# Every host has this folder and the data under the same paths and lets this one in by ssh without a password.
# OUT is on a disk that all hosts share: each rank writes its part of a checkpoint there. Where there is none: --checkpoint-every 0,
# and a run that is stopped cannot be resumed. Ctrl-C ends the run with a checkpoint and status 75, a second one at once. Open MPI.
set -eu
if [ $# -lt 2 ]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; [ "${1:-}" = --help ]; exit; fi
# shellcheck source=scripts/run_child.sh
. "$(dirname "$0")/run_child.sh"
stop() { echo "mpirun_hosts: $*" >&2; exit 1; }
hostfile=$1
shift
[ -r "$hostfile" ] || stop "$hostfile cannot be read; it has a line 'NAME slots=8' for each host"
command -v mpirun > /dev/null || stop "mpirun is not here: apt install openmpi-bin libopenmpi-dev"
program=$(command -v "$1") || stop "$1 is no program that can be run; make ${1#./}"
program=$(realpath "$program")
shift

hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
ranks=0 names=()
while read -r name rest; do
    case "$name" in "" | "#"*) continue ;; esac
    slots=8
    [[ " $rest " =~ [[:space:]]slots=([0-9]+)[[:space:]] ]] && slots=${BASH_REMATCH[1]}
    [ "$slots" -gt 0 ] || stop "$hostfile: $name has slots=$slots, expected at least 1"
    echo "$name slots=$slots" >> "$hosts"
    ranks=$((ranks + slots)) names+=("$name")
done < "$hostfile"
[ $ranks -gt 0 ] || stop "$hostfile names no host; it has a line 'NAME slots=8' for each"

# Asked before mpirun, whose own words about a host it cannot reach are many.
for name in "${names[@]}"; do
    case "$name" in localhost | "$(hostname)") continue ;; esac
    # shellcheck disable=SC2029    # the path of here is the path of there
    ssh -o BatchMode=yes -o ConnectTimeout=10 "$name" "test -x '$program'" < /dev/null || stop \
        "$name: ssh does not work without a password, or $program is not there"
done

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# map-by slot: filled in order of the file, so that neighbours in number are neighbours on a host; bind-to none: a rank
# bound to one core would run its threads by turns. -x: variables that the ranks on other hosts get too.
pass=()
for name in $(compgen -e | grep -E '^(NCCL_|HOST_|LD_LIBRARY_PATH$)'); do pass+=(-x "$name"); done
echo "mpirun_hosts: $ranks ranks on ${#names[@]} hosts"
run_child mpirun -np $ranks --hostfile "$hosts" --map-by slot --bind-to none "${pass[@]}" "$program" "$@" --ranks $ranks
exit $status
