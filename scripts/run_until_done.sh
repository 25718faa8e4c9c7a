#!/usr/bin/env bash
# Runs a command again for as long as it asks for that.
#
#   scripts/run_until_done.sh COMMAND...     e.g. mpirun -np 8 ./train_gpt2 --recipe modern --out runs/modern ...
#
#   exit status 0    done
#   exit status 75   "start me again" (EX_TEMPFAIL): started again
#   any other        an error, or a person's Ctrl-C: the end, with that status
#
# Progress is the number in the last `step:` line of OUT/log.txt; OUT is the command's --out. Two attempts one after
# the other that do not raise it are the end, with status 1. SIGINT, SIGTERM, SIGHUP and SIGUSR1 go on to the
# command, SIGUSR2 does not; after any of them nothing is started again: then 75 is this script's own status, for
# whoever started it (Slurm's requeue in multi_node.sbatch).
set -u
if [ $# -eq 0 ] || [ "$1" = --help ]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; [ $# -gt 0 ]; exit; fi

say() { echo "run_until_done: $*" >&2; }

out=run                                   # the trainer's own default
for ((i = 1; i <= $#; i++)); do
    case "${!i}" in
        --out) j=$((i + 1)); out="${!j:-run}" ;;
        --out=*) out="${!i#--out=}" ;;
    esac
done

last_step() {      # the number of the last step in the log; -1: none yet
    local line
    line=$(grep -aE '^step:[0-9]+' "$out/log.txt" 2> /dev/null | tail -1)
    line=${line#step:}
    line=${line%%[!0-9]*}
    echo "$((${line:-0} - (${#line} == 0)))"
}

child="" signal="" signals=0
name=${1##*/}
pass_on() {      # pass_on SIGNAL
    [ "$1" = USR2 ] && return
    # srun would kill its tasks at once, and Slurm itself sends them the SIGTERM with which it ends a job.
    [ "$1" = TERM ] && [ "$name" = srun ] && return
    kill -"$1" "$child" 2> /dev/null
}
on_signal() {
    signal=$1 signals=$((signals + 1))
    say "SIG$1: nothing will be started again"
    [ -z "$child" ] || pass_on "$1"
}
for i in INT TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064    # the name of now
    trap "on_signal $i" $i
done

# What an earlier run left in OUT is not this one's progress, unless Slurm has put this one back into the queue.
best=-1
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && best=$(last_step)
attempt=0 stuck=0
while true; do
    attempt=$((attempt + 1))
    say "attempt $attempt: $*"
    # In a process group of its own, so that a Ctrl-C reaches the command once, through this script.
    set -m
    "$@" < /dev/null &
    child=$!
    set +m
    [ -z "$signal" ] || pass_on "$signal"      # it came in between
    # A signal ends wait early, with a status that is not the command's; 127: that one was the command's after all.
    status=""
    while true; do
        seen=$signals
        wait "$child"; code=$?
        [ $code -ne 127 ] || [ -z "$status" ] && status=$code
        [ $seen -eq $signals ] && break
    done
    child=""
    step=$(last_step)
    if [ $status -eq 0 ]; then
        say "done at step $step, attempt $attempt"
        exit 0
    fi
    if [ $status -ne 75 ]; then
        say "exit status $status at step $step: the end"
        exit $status
    fi
    if [ -n "$signal" ]; then
        say "exit status 75 at step $step, after SIG$signal"
        exit 75
    fi
    if [ "$step" -gt "$best" ]; then
        best=$step stuck=0
    else
        stuck=$((stuck + 1))
        if [ $stuck -eq 2 ]; then
            say "exit status 75 at step $step: two attempts did not get beyond step $best; not started again"
            exit 1
        fi
    fi
    say "exit status 75 at step $step: starting again"
done
