#!/usr/bin/env bash
# test/faults.sh PROGRAM [TRIALS]: kill -9 of one of four ranks at a random moment of the first two seconds, TRIALS times (20).
#   Each time all processes are gone within 30 s, mpirun says it failed, and there is one message, which names the rank and its log;
#   no process and no shared memory is left. A kill before all ranks have their logs cannot be named so well:
#   then it is at most one message, and the same end; those trials are counted apart.
#   What has a checkpoint's name is one, in spite of kills.
#   The end of mpirun itself ends the ranks; a rank that is only stopped is waited for, as long as HOST_NCCL_TIMEOUT says.
# SEED=n repeats a sequence of moments and ranks.
set -u
program=$(realpath "$1")
trials=${2:-20}
tools=$(dirname "$program")
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOST_THREADS=1 TMPDIR="$work/tmp"      # where Open MPI keeps its files: so that only ours are there
mkdir "$TMPDIR"
seed=${SEED:-$((16#$(od -An -tx2 -N2 /dev/urandom | tr -d ' ')))}
RANDOM=$seed

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
milliseconds() { local t=${EPOCHREALTIME/[.,]/}; echo $((t / 1000)); }
alive() {      # alive PID: there, and not only waiting for its parent to notice its end
    local state; state=$(sed -nE 's/^State:\s+(.).*/\1/p' "/proc/$1/status" 2> /dev/null)
    [ -n "$state" ] && [ "$state" != Z ]
}
variable() {      # variable PID NAME: of a process's environment
    local all entry
    mapfile -d '' -t all 2> /dev/null < "/proc/$1/environ"
    for entry in "${all[@]}"; do [ "${entry%%=*}" = "$2" ] && echo "${entry#*=}"; done
}

"$tools/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
# Evaluations and saves often enough that kills meet them, too.
line=(--recipe modern --layers 2 --heads 2 --channels 64 --vocab 320 --seq-len 32 --micro-batch 1 --batch-tokens 128 --val-tokens 500
      --val-every 5 --checkpoint-every 7 --steps 10000000 --epochs 0 --train "$work/text_train_*.bin" --val "$work/text_val_*.bin")

start() {      # start NAME RANKS PROGRAM...: leaves mpirun's pid and those of the ranks in $launcher and $pids
    local name="$1" ranks="$2" found pid; shift 2
    mpirun -np "$ranks" "$@" "${line[@]}" --out "$work/$name" > "$work/$name.txt" 2> "$work/$name.err" &
    launcher=$!
    for _ in $(seq 3000); do
        pids=()
        found=0
        for pid in $(pgrep -P $launcher); do
            local r; r=$(variable "$pid" OMPI_COMM_WORLD_RANK)
            [ -n "$r" ] && pids[r]=$pid && found=$((found + 1))
        done
        [ $found -eq "$ranks" ] && return
        sleep 0.01
    done
    check 1 "$name: $ranks ranks start"
}
running() {      # running NAME: all ranks have their logs, for after that rank 0 prints the table
    grep -aq '^parameters ' "$work/$1.txt"
}
await() { for _ in $(seq 600); do running "$1" && grep -q "${2:-.}" "$work/$1/log.txt" && return; sleep 0.1; done; }      # NAME [REGEX]
ends() {      # ends NAME SECONDS: all are gone within 30 s; $took milliseconds, $status is mpirun's
    local from pid left
    from=$(milliseconds)
    while :; do
        left=()
        for pid in "$launcher" "${pids[@]}"; do alive "$pid" && left+=("$pid"); done
        took=$(($(milliseconds) - from))
        [ ${#left[@]} -eq 0 ] || [ $took -ge $((1000 * $2)) ] && break
        sleep 0.02
    done
    [ ${#left[@]} -eq 0 ]; check $? "$1: all gone within $2 s (left: ${left[*]})"
    [ ${#left[@]} -gt 0 ] && kill -9 "${left[@]}"
    wait "$launcher" 2> /dev/null
    status=$?
}
messages() { grep -ac '^train_gpt2: ' "$work/$1.err"; }
segments() {      # what Open MPI keeps in /dev/shm is named after the job
    find /dev/shm -name "*.$(printf %x "$job").*" 2> /dev/null
}
whole_files() {      # whole_files NAME: what has a checkpoint's name has a manifest that is right, and files as long as that says
    local manifest file bytes sum
    for manifest in "$work/$1"/checkpoints/step_*/manifest.json; do
        [ "$manifest" = "$work/$1/checkpoints/step_*/manifest.json" ] && break
        sum=$(head -n -1 "$manifest" | gzip -c | tail -c 8 | od -An -tx4 -N4 | tr -d ' ')
        [ "$(tail -1 "$manifest")" = "\"crc32\":\"$sum\"}" ] || return 1
        while read -r file bytes; do
            [ "$(stat -c %s "$(dirname "$manifest")/$file")" = "$bytes" ] || return 1
            checkpoints=$((checkpoints + 1))
        done < <(sed -nE 's/^(.*\[)?\{"name":"([^"]*)","bytes":([0-9]+).*/\2 \3/p' "$manifest")
    done
}
finish() {
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
}

# ---- under ThreadSanitizer -----------------------------------------------------------------
# With a program that was built for it this is all: a rank is killed, a thread of the others notices.
if [[ "$tools" == *-thread ]]; then
    name=thread
    start $name 2 "$program"
    await $name '^step:3/'
    kill -9 "${pids[1]}"
    ends "under TSan" 30
    [ $status -ne 0 ]; check $? "under TSan: not 0"
    [ "$(messages $name)" -eq 1 ]; check $? "under TSan: one message (found $(messages $name))"
    ! grep -aq 'WARNING: ThreadSanitizer' "$work/$name.err" "$work/$name.txt"; check $? "under TSan: nothing found"
    finish
fi

# ---- kill -9 of a rank ---------------------------------------------------------------------
named=0 early=0 silent=0 worst=0 checkpoints=0
for ((trial = 1; trial <= trials; trial++)); do
    name=trial-$trial
    rank=$((RANDOM % 4)) delay=$((RANDOM % 2000))
    start $name 4 "$program"
    what="trial $trial (rank $rank after $delay ms)"
    sleep "$(printf '%d.%03d' $((delay / 1000)) $((delay % 1000)))"
    job=$(variable "${pids[rank]}" PMIX_NAMESPACE)
    known=no; running $name && known=yes
    kill -9 "${pids[rank]}"
    ends "$what" 30
    [ -n "${VERBOSE:-}" ] && echo "note  $what: $took ms, $(messages $name) message(s)"
    [ $took -gt $worst ] && worst=$took
    [ $status -ne 0 ]; check $? "$what: mpirun's exit status is not 0"
    if [ $rank -eq 0 ]; then log="$work/$name/log.txt"; else log="$work/$name/log.rank$rank.txt"; fi
    if [ $known = yes ]; then
        named=$((named + 1))
        [ "$(messages $name)" -eq 1 ]; check $? "$what: one message (found $(messages $name))"
        grep -aqE "^train_gpt2: rank $rank of 4 \(host .*, pid ${pids[rank]}\) is gone" "$work/$name.err"
        check $? "$what: it names the rank: $(grep -am1 '^train_gpt2: ' "$work/$name.err")"
        grep -aqF "its log is $log" "$work/$name.err" && [ -s "$log" ]; check $? "$what: and its log, which is there"
        # Who speaks also writes it down: rank 0, or if that is gone another.
        told=("$work/$name/log.txt")
        [ $rank -eq 0 ] && told=("$work/$name"/log.rank*.txt)
        tail -qn 3 "${told[@]}" | grep -q "^train_gpt2: rank $rank of 4 .* is gone"; check $? "$what: it ends a log"
    else
        early=$((early + 1))
        [ "$(messages $name)" -le 1 ]; check $? "$what: not more than one message (found $(messages $name))"
        [ "$(messages $name)" -eq 0 ] && silent=$((silent + 1))
    fi
    [ -z "$(segments)" ]; check $? "$what: nothing left in /dev/shm: $(segments | tr '\n' ' ')"
    left=$(find "$TMPDIR" -not -type d | head -3 | tr '\n' ' ')
    [ -z "$left" ]; check $? "$what: nothing left in TMPDIR: $left"
    whole_files $name; check $? "$what: checkpoints are whole"
    rm -rf "${TMPDIR:?}"/* "$work/$name"
done
echo "note  $named kills of ranks that ran, $early before all had their logs: $((early - silent)) with a message, $silent" \
     "with mpirun's words alone. $checkpoints files of checkpoints. Slowest end: $worst ms. SEED=$seed"
[ $trials -lt 8 ] || [ $checkpoints -gt 0 ]; check $? "some kills came behind a checkpoint"
[ $((named + early)) -eq "$trials" ] && [ $((trials < 8 || named > 0)) -eq 1 ]; check $? "some kills met ranks that run"

# ---- kill -9 of mpirun ---------------------------------------------------------------------
name=launcher
start $name 4 "$program"
await $name '^step:3/'
job=$(variable "${pids[0]}" PMIX_NAMESPACE)
kill -9 $launcher
ends "kill of mpirun" 30 2> /dev/null      # without what bash says about it
echo "note  the ranks of a killed mpirun took $took ms to end"
# Nobody is left who could remove what mpirun keeps: that is not looked at here.
[ -n "$job" ] && segments | xargs -r rm -f
rm -rf "${TMPDIR:?}"/*

# ---- a rank that is stopped ----------------------------------------------------------------
# Its connections stay open: that is no death. The others wait in their next collective, and go on when it does.
name=stopped
start $name 4 "$program"
await $name '^step:3/'
kill -STOP "${pids[1]}"
sleep 1
before=$(grep -c '^step:' "$work/$name/log.txt")
sleep 2
after=$(grep -c '^step:' "$work/$name/log.txt")
[ "$before" -eq "$after" ] && alive "${pids[0]}" && alive "${pids[2]}"; check $? "a stopped rank is waited for ($before, $after lines)"
kill -CONT "${pids[1]}"
for _ in $(seq 100); do [ "$(grep -c '^step:' "$work/$name/log.txt")" -gt $((after + 3)) ] && break; sleep 0.1; done
[ "$(grep -c '^step:' "$work/$name/log.txt")" -gt $((after + 3)) ]; check $? "and the run goes on with it"
kill -INT "${pids[2]}"
ends "the end of that run" 30
[ $status -eq 75 ]; check $? "a signal ends it as any other (status $status)"
# Not for ever: the host's NCCL names the rank that does not come. On GPUs NCCL itself waits without end.
name=timeout
HOST_NCCL_TIMEOUT=3 start $name 4 "$program"
await $name '^step:3/'
kill -STOP "${pids[1]}"
ends "HOST_NCCL_TIMEOUT=3" 30
[ $status -ne 0 ]; check $? "HOST_NCCL_TIMEOUT=3: not 0 (status $status)"
grep -aqE 'host: nccl: .*rank' "$work/$name.err"; check $? "HOST_NCCL_TIMEOUT=3: says who is waited for: $(head -1 "$work/$name.err")"

finish
