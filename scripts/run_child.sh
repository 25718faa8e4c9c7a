# shellcheck shell=bash
# Sourced by the scripts that start runs.
#
#   run_child COMMAND...   runs it; its exit status is in $status then. SIGINT, SIGTERM, SIGHUP and SIGUSR1 that the script gets go
#                          on to it, SIGUSR2 does not. $signal is the last that came, $signals how many did
#   run_folder BASE RESUME the folder for a new run: BASE, or BASE-2, BASE-3 .. where those are taken, since a run does not write
#                          over another; with RESUME not empty the last of these that is there, to go on in
#
# To mpirun the first signal is sent as SIGUSR1, which it passes on: the ranks end with a checkpoint and status 75. Of any other Open
# MPI makes SIGTERM a second later, SIGKILL after another, and 1 of whatever the ranks end with. srun is sent no SIGTERM, with which it
# would kill its tasks at once; Slurm itself sends them the one that ends a job.
child="" child_name="" signal="" signals=0 status=0

pass_on() {      # pass_on SIGNAL
    case $child_name:$1 in
        *:USR2 | srun:TERM) return ;;
        mpirun:* | mpiexec:* | orterun:*) [ $signals -gt 1 ] || set -- USR1 ;;
    esac
    kill -"$1" "$child" 2> /dev/null || true
}
signal_came() { :; }      # for a script that has something to say then
on_signal() {
    signal=$1 signals=$((signals + 1))
    signal_came
    [ -z "$child" ] || pass_on "$1"
}

run_child() {
    local seen code name
    for name in INT TERM HUP USR1 USR2; do
        # shellcheck disable=SC2064    # the name of now
        trap "on_signal $name" $name
    done
    child_name=${1##*/} status=""
    # In a process group of its own, so that a Ctrl-C reaches the command once, through this script.
    set -m
    "$@" < /dev/null &
    child=$!
    set +m
    [ -z "$signal" ] || pass_on "$signal"      # it came in between
    # A signal ends wait early, with a status that is not the command's; 127: that one was the command's after all.
    while true; do
        seen=$signals code=0
        wait "$child" || code=$?
        [ $code -eq 127 ] && [ -n "$status" ] || status=$code
        [ $seen -ne $signals ] || break
    done
    child=""
}

run_folder() {
    local last="$1" next="$1" n=1
    while [ -n "$(ls -A "$next" 2> /dev/null)" ]; do last=$next n=$((n + 1)) next=$1-$n; done
    if [ -n "${2:-}" ]; then echo "$last"; else echo "$next"; fi
}
