#!/usr/bin/env bash
# Runs a command again for as long as it asks for that.
#
#   scripts/run_until_done.sh COMMAND...     e.g. mpirun -np 8 ./train_gpt2 --recipe modern --out runs/modern --resume auto ...
#
#   exit status 0    done
#   exit status 75   "start me again" (EX_TEMPFAIL), after a checkpoint: started again
#   any other        an error, or a person's second Ctrl-C: the end, with that status
#
# COMMAND has --resume auto, without which a second start would go on from nothing. Progress is the step of the newest checkpoint in
# OUT/checkpoints; OUT is the command's --out. Two attempts one after the other that leave none beyond it are the end, with status 1.
# SIGINT, SIGTERM, SIGHUP and SIGUSR1 go on to the command (as scripts/run_child.sh says), SIGUSR2 does not; after any of them nothing
# is started again: then 75 is this script's own status, for whoever started it (Slurm's requeue in multi_node.sbatch).
set -u
if [ $# -eq 0 ] || [ "$1" = --help ]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; [ $# -gt 0 ]; exit; fi
# shellcheck source=scripts/run_child.sh
. "$(dirname "$0")/run_child.sh"

say() { echo "run_until_done: $*" >&2; }
signal_came() { say "SIG$signal: nothing is started again"; }

out=run resume=""                         # the trainer's own defaults
for ((i = 1; i <= $#; i++)); do
    j=$((i + 1))
    case "${!i}" in
        --out) out="${!j:-run}" ;;
        --out=*) out="${!i#--out=}" ;;
        --resume) resume="${!j:-}" ;;
        --resume=*) resume="${!i#--resume=}" ;;
    esac
done
case $resume in
    auto) ;;
    "") say "a second start would not go on where the first stopped: the command needs --resume auto"; exit 1 ;;
    *) say "--resume $resume goes on from there each time it is started: the command needs --resume auto"; exit 1 ;;
esac

last_step() {      # the step of the newest checkpoint (by time: one that was found broken may have a higher number); -1: there is none
    local name
    name=$(find "$out/checkpoints" -maxdepth 1 -name 'step_[0-9]*' -printf '%T@ %f\n' 2> /dev/null | sort -n | tail -1)
    name=${name##*step_}
    if [[ $name =~ ^[0-9]+$ ]]; then echo $((10#$name)); else echo -1; fi
}

best=$(last_step)
attempt=0 stuck=0 status=0
while true; do
    attempt=$((attempt + 1))
    say "attempt $attempt: $*"
    run_child "$@"
    step=$(last_step)
    if [ $status -eq 0 ]; then
        say "done, attempt $attempt"
        exit 0
    fi
    if [ $status -ne 75 ]; then
        say "exit status $status, last checkpoint at step $step: the end"
        exit $status
    fi
    if [ -n "$signal" ]; then
        say "exit status 75 after SIG$signal, last checkpoint at step $step"
        exit 75
    fi
    if [ "$step" -gt "$best" ]; then
        best=$step stuck=0
    else
        stuck=$((stuck + 1))
        if [ $stuck -eq 2 ]; then
            say "exit status 75: two attempts left no checkpoint beyond step $best; not started again"
            exit 1
        fi
    fi
    say "exit status 75, checkpoint at step $step: starting again"
done
