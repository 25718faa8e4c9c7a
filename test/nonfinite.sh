#!/usr/bin/env bash
# test/nonfinite.sh PROGRAM: steps that are not finite, on one rank and on two. HOST_NAN puts a NaN into what a kernel writes.
#   --on-nonfinite stop, skip, rollback: what is applied, what is said, which status; the ways in which skip and rollback give up
#   weights that are not finite, in a file and by too high a rate
set -u
program=$(realpath "$1")
tools=$(dirname "$program")
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOST_THREADS=1

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
has() { grep -qE -- "$3" "$2"; check $? "$1: $3 (found: $(grep -a '^train_gpt2' -A 5 "$2" | head -6 | tr '\n' ' '))"; }      # has NAME FILE REGEX
tensor_bytes() {      # a safetensors file without its header, which names the output directory
    local header; header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
    tail -c +$((9 + header)) "$1"
}
same_tensors() { [ -s "$2" ] && [ -s "$3" ] && cmp -s <(tensor_bytes "$2") <(tensor_bytes "$3"); check $? "$1"; }
loss() { sed -nE "s/.*\"event\":\"train\",\"step\":$2,.*\"train_loss\":([0-9.e+-]+).*/\1/p" "$work/$1/log.jsonl"; }      # NAME STEP

"$tools/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
line=(--recipe modern --layers 2 --heads 2 --channels 64 --vocab 320 --seq-len 32 --micro-batch 2 --batch-tokens 128 --val-tokens 500
      --val-every 100 --cooldown-frac 0 --batching stream --epochs 0 --keep 9
      --train "$work/text_train_*.bin" --val "$work/text_val_*.bin")
run() {      # run NAME RANKS STATUS FLAGS...
    local name="$1" ranks="$2" want="$3" launch=() status; shift 3
    [ "$ranks" -gt 1 ] && launch=(timeout -k 10 60 mpirun -np "$ranks")
    [[ " $* " == *" --steps "* ]] || set -- --steps 8 --checkpoint-every 2 "$@"
    "${launch[@]}" "$program" "${line[@]}" --out "$work/$name" "$@" > "$work/$name.txt" 2> "$work/$name.err"
    status=$?
    [ $status -eq "$want" ]; check $? "$name: exit $want (got $status): $(grep -a '^train_gpt2' "$work/$name.err" | head -1)"
}
steps() { grep -c '^step:[0-9]*/8 train_loss' "$work/$1/log.txt"; }
points() { (cd "$work/$1/checkpoints" && echo step_*); }

# Two launches of the kernel in a micro-step; of one rank a step has two of those, of two ranks one each. So the NaN is in step 5.
run whole-1 1 0
for ranks in 1 2; do
    [ $ranks -eq 1 ] && launch=18 || launch=9
    export HOST_NAN=relu2_backward_kernel:$launch
    name=stop-$ranks
    run $name $ranks 2
    has $name "$work/$name.err" '^train_gpt2: step 5 is not finite: loss [0-9.]+, gradient norm nan'
    has $name "$work/$name.err" 'rank 0: gradients not finite: [0-9]+ in h\.[01]\.'
    has $name "$work/$name.err" 'its data begins at token 512 of .*text_train_000001.bin, epoch 0'
    has $name "$work/$name.err" 'stopped before the update'
    grep -q 'step 5 is not finite' "$work/$name/log.txt"; check $? "$name: it stands in the log"
    [ "$(points $name)" = "step_000002 step_000004" ]; check $? "$name: checkpoints are from before: $(points $name)"
    ! [ -e "$work/$name/model.safetensors" ]; check $? "$name: no weights are left"
    [ "$(steps $name)" -eq 4 ]; check $? "$name: four steps in the log: $(steps $name)"
    [ "$(tail -1 "$work/$name/log.jsonl")" = '{"event":"end","status":2}' ]; check $? "$name: the log ends with the status"
    unset HOST_NAN
    run $name $ranks 0 --resume auto
    [ $ranks -eq 1 ] && same_tensors "$name: resumed, it ends as if nothing had been" "$work/whole-1/model.safetensors" "$work/$name/model.safetensors"

    export HOST_NAN=relu2_backward_kernel:$launch
    name=skip-$ranks
    run $name $ranks 0 --on-nonfinite skip
    has $name "$work/$name.err" 'left out'
    grep -qE '^step:5/8 train_loss:.* skipped$' "$work/$name/log.txt"; check $? "$name: the step says that it was left out"
    [ "$(grep -c 'skipped$' "$work/$name/log.txt")" -eq 1 ] && [ "$(steps $name)" -eq 8 ]; check $? "$name: no other one was"

    # Back at 4, it goes on with the data behind step 5: its step 5 is the skipping run's step 6, of the same weights. (The steps
    # behind are not: Adam counts a step that was left out.)
    name=back-$ranks
    run $name $ranks 0 --on-nonfinite rollback
    has $name "$work/$name.err" 'back at step 4 \(.*step_000004\)'
    [ "$(steps $name)" -eq 8 ]; check $? "$name: each step stands in the log once: $(steps $name)"
    [ -n "$(loss $name 5)" ] && [ "$(loss $name 5)" = "$(loss skip-$ranks 6)" ]
    check $? "$name: step 5 has the data of step 6 ($(loss $name 5), $(loss skip-$ranks 6))"
    grep -q '"step":5' "$work/$name/log.1.jsonl" && check 1 "$name: a step that was not applied is in the log of before"
    same_tensors "$name: the weights of step 4 are those of all" "$work/skip-$ranks/checkpoints/step_000004/model.safetensors" \
        "$work/$name/checkpoints/step_000004/model.safetensors"
    unset HOST_NAN
done

# ---- giving up -----------------------------------------------------------------------------
export HOST_NAN=relu2_backward_kernel:9+
run skips 2 2 --on-nonfinite skip --steps 30
has skips "$work/skips.err" 'too many steps in a row'
[ "$(grep -c '^ *left out$' "$work/skips.err")" -eq 10 ]; check $? "ten steps are left out before: $(grep -c '^ *left out$' "$work/skips.err")"
run backs 2 2 --on-nonfinite rollback
[ "$(grep -c 'back at step' "$work/backs.err")" -eq 3 ]; check $? "three times back: $(grep -c 'back at step' "$work/backs.err")"
has backs "$work/backs.err" 'came no farther'
export HOST_NAN=relu2_backward_kernel:2
run first 1 2 --on-nonfinite rollback
has first "$work/first.err" 'there is no checkpoint to go back to'
unset HOST_NAN

# ---- weights -------------------------------------------------------------------------------
cp "$work/whole-1/model.safetensors" "$work/nan.safetensors"
printf '\000\000\300\177' | dd of="$work/nan.safetensors" bs=1 seek=$(($(stat -c %s "$work/nan.safetensors") - 4)) conv=notrunc 2> /dev/null
for mode in stop skip; do
    run weights-$mode 2 2 --load "$work/nan.safetensors" --on-nonfinite $mode
    has weights-$mode "$work/weights-$mode.err" 'rank [01]: weights not finite: 1 in '
done
has weights-skip "$work/weights-skip.err" 'weights do not become finite again'
run rate 1 2 --steps 60 --muon-lr 100 --embed-lr 100 --checkpoint-every 0 --weight-decay 1
has rate "$work/rate.err" 'step [0-9]+ is not finite'

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
