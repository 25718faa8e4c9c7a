#!/usr/bin/env bash
# test/save_faults.sh PROGRAM [EVERY [SEED]]: the trainer while the calls that write its checkpoints fail, each in its turn or every
# EVERY-th (1) of them: no space, an I/O error, a disk that fills and stays full, one that can only be read from there on.
#   --on-save-error go: exit 0, a message for each checkpoint that failed, the weights of a run that nobody disturbed
#   --on-save-error stop: exit 1 and the message; started again with --resume auto it ends with those weights
#   Afterwards the newest directory that has a checkpoint's name is a whole one, and nothing half-written has such a name.
set -u
program=$(realpath "$1")
every=${2:-1}
tools=$(dirname "$program")
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
seed=${3:-${SEED:-$((16#$(od -An -tx2 -N2 /dev/urandom | tr -d ' ')))}}
RANDOM=$seed
export HOST_THREADS=1

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
tensor_bytes() {      # a safetensors file without its header, which names the output directory
    local header; header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
    tail -c +$((9 + header)) "$1"
}
"$tools/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
line=(--recipe modern --layers 1 --heads 1 --channels 64 --vocab 320 --seq-len 32 --micro-batch 1 --batch-tokens 64 --val-tokens 64
      --epochs 0 --train "$work/text_train_*.bin" --val "$work/text_val_*.bin")
short=(--steps 6 --checkpoint-every 2 --keep 1 --val-every 6)
# What reads is another test's: test_checkpoint.
watched=(LD_PRELOAD="$tools/faulty_files.so" FAULT_UNDER=/checkpoints
         "FAULT_CALLS=open,write,fsync,close,rename,mkdir,unlink,rmdir")
run() {      # run NAME VARIABLE=VALUE... -- FLAGS...
    local name="$1" variables=(); shift
    while [ "$1" != -- ]; do variables+=("$1"); shift; done
    shift
    timeout -k 10 60 env ${variables[@]+"${variables[@]}"} "$program" "${line[@]}" "${short[@]}" --out "$work/$name" "$@" \
        > "$work/$name.txt" 2> "$work/$name.err"
}
newest() { "$tools/test_checkpoint" newest "$work/$1" 2>&1; }      # the step of the newest whole checkpoint, and what is refused
same_weights() {      # same_weights WHAT WHOLE: as those of $work/WHOLE
    cmp -s <(tensor_bytes "$work/$2/model.safetensors") <(tensor_bytes "$work/run/model.safetensors"); check $? "$1: the weights in the end"
}

# ---- each call in its turn -----------------------------------------------------------------
run whole "${watched[@]}" FAULT_TRACE="$work/calls" -- ; check $? "the run that nobody disturbs: $(head -1 "$work/whole.err")"
count=$(wc -l < "$work/calls")
[ "$count" -gt 60 ]; check $? "it calls for its files: $count times"
[ "$(newest whole)" = 6 ]; check $? "its newest checkpoint: $(newest whole)"
# The calls of the first checkpoint: what fails there leaves none.
first=$(grep -nm1 ' rename .*step_000002' "$work/calls" | cut -d: -f1)

declare -A words=([ENOSPC]="No space left on device" [EIO]="Input/output error" [full]="No space left on device"
                  [EROFS]="Read-only file system")
runs=0 kept=0
for ((at = 1 + RANDOM % every; at <= count; at += every)); do
    for error in ENOSPC EIO full EROFS; do
        times=1
        [ $error = EROFS ] && times=0
        for mode in go stop; do
            runs=$((runs + 1))
            what="$error at call $at ($(sed -n "${at}p" "$work/calls" | sed "s|$work/whole/||; s|^[0-9]* ||")), $mode"
            rm -rf "$work/run"
            run run "${watched[@]}" FAULT_AT=$at FAULT_TIMES=$times FAULT_ERROR=$error -- --on-save-error $mode
            status=$?
            lost=$(grep -ac '^train_gpt2: no checkpoint of step' "$work/run.err")
            if [ -s "$work/run.err" ]; then
                grep -aqF "${words[$error]}" "$work/run.err"; check $? "$what: the message has the reason: $(head -1 "$work/run.err")"
                grep -aqF "$work/run/checkpoints" "$work/run.err"; check $? "$what: and the path"
            fi
            # What cannot be removed is worth a message, but the checkpoint is there.
            [ "$lost" -eq 0 ] && kept=$((kept + 1))
            wanted=0
            [ "$lost" -gt 0 ] && [ $mode = stop ] && wanted=1
            [ $status -eq $wanted ]; check $? "$what: exit $wanted (got $status): $(head -1 "$work/run.err")"
            [ "$lost" -le 3 ]; check $? "$what: one message for each checkpoint that is lost ($lost)"
            left=$(newest run)
            if [ "$at" -gt "${first:-0}" ]; then
                [[ "$left" =~ ^[246]$ ]]; check $? "$what: a whole checkpoint is there ($left)"
            else
                [[ "$left" =~ ^([246]|none)$ ]]; check $? "$what: no broken checkpoint is there ($left)"
            fi
            if [ $mode = stop ] && [ $status -ne 0 ]; then
                run run -- --resume auto; check $? "$what: started again: $(head -1 "$work/run.err")"
                [ "$(newest run)" = 6 ]; check $? "$what: and its checkpoints are written: $(newest run)"
            fi
            same_weights "$what" whole
        done
    done
done
# ---- the weights of the end ----------------------------------------------------------------
rm -rf "$work/run"
run run LD_PRELOAD="$tools/faulty_files.so" FAULT_UNDER="$work/run/model" FAULT_CALLS=write FAULT_AT=3 FAULT_ERROR=ENOSPC --
status=$?
[ $status -eq 1 ] && grep -aqE 'model.safetensors: .*No space left on device' "$work/run.err"
check $? "no space for the weights of the end: exit 1 (got $status): $(head -1 "$work/run.err")"
! [ -e "$work/run/model.safetensors" ]; check $? "no part of them has their name"
run run -- --resume auto; check $? "started again: $(head -1 "$work/run.err")"
same_weights "started again" whole

# ---- a signal ------------------------------------------------------------------------------
# The run ends either way; that it is not to be started again for nothing must show in its status.
rm -rf "$work/run"
env "${watched[@]}" FAULT_AT=1 FAULT_TIMES=0 FAULT_ERROR=ENOSPC "$program" "${line[@]}" --out "$work/run" --steps 1000000 \
    --checkpoint-every 0 --val-every 1000000 > "$work/run.txt" 2> "$work/run.err" &
for _ in $(seq 300); do grep -q '^step:8/' "$work/run/log.txt" 2> /dev/null && break; sleep 0.1; done
kill -TERM $!
wait $!; status=$?
[ $status -eq 1 ] && grep -aq '^train_gpt2: no checkpoint of step' "$work/run.err"
check $? "SIGTERM on a full disk: exit 1 (got $status): $(head -1 "$work/run.err")"

# ---- two ranks -----------------------------------------------------------------------------
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
run_pair() {      # run_pair NAME VARIABLE=VALUE... -- FLAGS...
    local name="$1" variables=(); shift
    while [ "$1" != -- ]; do variables+=("$1"); shift; done
    shift
    timeout -k 10 60 env ${variables[@]+"${variables[@]}"} mpirun -np 2 "$program" "${line[@]}" "${short[@]}" --out "$work/$name" "$@" \
        > "$work/$name.txt" 2> "$work/$name.err"
}
run_pair pair "${watched[@]}" FAULT_CALLS=write FAULT_RANK=1 FAULT_TRACE="$work/pair.trace" --
check $? "two ranks: $(head -1 "$work/pair.err")"
writes=$(wc -l < "$work/pair.trace")      # of rank 1, who has fewer
[ "$writes" -ge 6 ]; check $? "two ranks: rank 1 writes $writes times"
[ "$(newest pair)" = 6 ]; check $? "two ranks: the newest checkpoint: $(newest pair)"
for rank in 0 1; do
    for mode in go stop; do
        at=$((1 + RANDOM % writes))
        what="two ranks, no space for rank $rank from its write $at on, $mode"
        rm -rf "$work/run"
        run_pair run "${watched[@]}" FAULT_CALLS=write FAULT_RANK=$rank FAULT_AT=$at FAULT_TIMES=0 FAULT_ERROR=ENOSPC -- \
            --on-save-error $mode
        status=$?
        wanted=0; [ $mode = stop ] && wanted=1
        [ $status -eq $wanted ]; check $? "$what: exit $wanted (got $status): $(head -1 "$work/run.err")"
        grep -aqE "^train_gpt2: no checkpoint of step [246]: rank $rank: $work/run/checkpoints.*No space left" "$work/run.err"
        check $? "$what: it names the rank: $(head -1 "$work/run.err")"
        [ "$(grep -ac '^train_gpt2: ' "$work/run.err")" -le 3 ]; check $? "$what: one message for each checkpoint"
        if [ $mode = stop ]; then run_pair run -- --resume auto; check $? "$what: started again: $(head -1 "$work/run.err")"; fi
        same_weights "$what" pair
    done
done
echo "note  $runs runs, in $kept of them no checkpoint was lost; a run makes $count calls. SEED=$seed"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
