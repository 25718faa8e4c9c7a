#!/usr/bin/env bash
# test/cli.sh PROGRAM: the trainer as a user meets it, on shards made from this repository's own text.
#   same flags, same seed: equal logs (times aside) and equal weights, twice, on 1 and 2 OS threads, in another order of execution
#   log lines, saved weights, --load and samples, --dry-run, Ctrl-C, losses that are not finite, the words that bad input gets
# What goes on from a checkpoint has a test of its own: test/resume.sh.
set -u
program=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 1
tools=$(dirname "$program")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

check() {      # check NAME STATUS: 0 passes
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $1"; failed=$((failed + 1)); fi
}
has() { grep -qE -- "$3" "$2"; check "$1: $3" $?; }      # has NAME FILE REGEX
same() { cmp -s "$2" "$3"; check "$1" $?; }
without_times() { grep -E '^(step|RESULT)' "$1" | sed -E 's/(train_time|step_avg):[0-9.]+ms//g'; }
tensor_bytes() {      # a safetensors file without its header, which names the output directory
    local header; header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
    tail -c +$((9 + header)) "$1"
}

"$tools/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh > /dev/null; check "text_to_shards" $?
base=(--layers 2 --heads 2 --channels 64 --vocab 320 --seq-len 32 --micro-batch 4 --batch-tokens 256 --val-tokens 500 --val-every 4
      --steps 6 --batching stream --train "$work/text_train_*.bin" --val "$work/text_val_*.bin")
arguments() {      # arguments NAME FLAGS...: the command line of a small run into $work/NAME; FLAGS replace those of base
    local name="$1" i; shift
    line=("$program")
    for ((i = 0; i < ${#base[@]}; i += 2)); do
        [[ " $* " == *" ${base[i]} "* ]] || line+=("${base[i]}" "${base[i + 1]}")
    done
    line+=(--out "$work/$name" "$@")
}
run() {      # run NAME FLAGS...: its words into $work/NAME.txt
    arguments "$@"
    "${line[@]}" > "$work/$1.txt" 2>&1
}

# ---- equal runs ----------------------------------------------------------------------------
for recipe in modern untied unet; do
    HOST_THREADS=1 run $recipe-1 --recipe $recipe; check "$recipe runs on one thread" $?
    HOST_THREADS=2 run $recipe-2 --recipe $recipe; check "$recipe runs on two threads" $?
    HOST_THREADS=2 HOST_LEAKS=1 run $recipe-3 --recipe $recipe; check "$recipe runs again and frees its memory" $?
    HOST_SCHED=7 HOST_STREAMS=lazy run $recipe-4 --recipe $recipe; check "$recipe runs in another order" $?
    for other in 2 3 4; do
        same "$recipe: log of run $other" <(without_times "$work/$recipe-1/log.txt") <(without_times "$work/$recipe-$other/log.txt")
        same "$recipe: weights of run $other" <(tensor_bytes "$work/$recipe-1/model.safetensors") \
             <(tensor_bytes "$work/$recipe-$other/model.safetensors")
    done
done
run seed-2 --recipe modern --seed 2
! cmp -s <(tensor_bytes "$work/modern-1/model.safetensors") <(tensor_bytes "$work/seed-2/model.safetensors")
check "another seed gives other weights" $?

# ---- the log -------------------------------------------------------------------------------
log="$work/modern-1/log.txt"
has "log" "$log" '^step:0/6 val_loss:[0-9.]+ train_time:0ms step_avg:[0-9.na]+ms$'
has "log" "$log" '^step:4/6 val_loss:'
has "log" "$log" '^step:6/6 val_loss:'
has "log" "$log" '^step:1/6 train_loss:[0-9.]+ train_time:[0-9]+ms step_avg:[0-9.]+ms$'
has "log" "$log" '^RESULT val_loss:[0-9.]+ target:3.28 reached:(yes|no) train_time:[0-9]+ms tokens:1536 seed:1 commit:'
check "RESULT is the last line" "$(tail -1 "$log" | grep -q ^RESULT; echo $?)"

# ---- weights: saved, loaded, sampled -------------------------------------------------------
run saved --recipe unet --checkpoint-every 4
run loaded --recipe unet --load "$work/saved/model.safetensors" --steps 1
end=$(grep -oE '^step:6/6 val_loss:[0-9.]+' "$work/saved/log.txt" | cut -d: -f3)
start=$(grep -oE '^step:0/1 val_loss:[0-9.]+' "$work/loaded/log.txt" | cut -d: -f3)
[ -n "$end" ] && [ "$end" = "$start" ]; check "--load starts where the file ended ($end, $start)" $?
# A checkpoint's folder will do as well; its weights are those of its step.
run loaded-4 --recipe unet --load "$work/saved/checkpoints/step_000004" --steps 1
end=$(grep -oE '^step:4/6 val_loss:[0-9.]+' "$work/saved/log.txt" | cut -d: -f3)
start=$(grep -oE '^step:0/1 val_loss:[0-9.]+' "$work/loaded-4/log.txt" | cut -d: -f3)
[ -n "$end" ] && [ "$end" = "$start" ]; check "--load CHECKPOINT starts where it was saved ($end, $start)" $?
run sampled --recipe unet --load "$work/saved/model.safetensors" --train '' --sample-tokens 20 --sample-temperature 0
has "sample" "$work/sampled.txt" '.'
run wrong --recipe unet --load "$work/saved/model.safetensors" --channels 128; check "a file of another shape is refused" $((! $?))
has "wrong shape" "$work/wrong.txt" 'model.safetensors: .* shape'

# ---- a weight that is not a number ---------------------------------------------------------
cp "$work/saved/model.safetensors" "$work/nan.safetensors"
printf '\000\000\300\177' | dd of="$work/nan.safetensors" bs=1 seek=$(($(stat -c %s "$work/nan.safetensors") - 4)) conv=notrunc 2> /dev/null
run diverged --recipe unet --load "$work/nan.safetensors"; status=$?
[ $status -eq 2 ]; check "what is not finite ends the run with 2 (got $status)" $?
has "not finite" "$work/diverged.txt" 'step 1 is not finite: loss '
has "not finite" "$work/diverged.txt" 'weights not finite: 1 in '
has "not finite" "$work/diverged.txt" 'its data begins at token [0-9]+ of .*text_train_000001.bin'
! [ -e "$work/diverged/model.safetensors" ]; check "and nothing is saved" $?

# ---- dry run -------------------------------------------------------------------------------
"$program" --recipe modern --dry-run > "$work/dry.txt" 2>&1; check "--dry-run of the record's own size" $?
has "dry run" "$work/dry.txt" 'parameters 123568128'
has "dry run" "$work/dry.txt" 'memory in all'

# ---- Ctrl-C --------------------------------------------------------------------------------
for signal in INT TERM; do
    arguments stopped-$signal --recipe modern --steps 100000 --epochs 0
    "${line[@]}" > "$work/stopped-$signal.txt" 2>&1 &
    for _ in $(seq 300); do grep -q '^step:8/' "$work/stopped-$signal/log.txt" 2> /dev/null && break; sleep 0.1; done
    kill -$signal $!
    wait $!; status=$?
    [ $status -eq 75 ]; check "SIG$signal ends the run with 75 (got $status)" $?
    last=$(sed -nE 's/^step:([0-9]+)\/.* train_loss:.*/\1/p' "$work/stopped-$signal/log.txt" | tail -1)
    [ -s "$work/stopped-$signal/checkpoints/$(printf step_%06d "$last")/manifest.json" ]; check "SIG$signal: a checkpoint of step $last is there" $?
    has "SIG$signal" "$work/stopped-$signal/log.txt" '^stopped by a signal after step [0-9]+ of 100000: .*--resume auto goes on'
done

# ---- bad input -----------------------------------------------------------------------------
refused() {      # refused REGEX FLAGS...
    local words="$1"; shift
    run refused "$@"; local status=$?
    [ $status -eq 1 ] && grep -qE -- "$words" "$work/refused.txt" && ! [ -e "$work/refused/model.safetensors" ]
    local ok=$?      # before the words of the name are made, which have a status too
    check "refused: $* (exit $status: $(head -1 "$work/refused.txt"))" $ok
}
refused 'no such|unknown|no flag' --recipe modern --stepz 5
refused 'wants an integer|not a' --recipe modern --seed 7x
refused 'batch-tokens' --recipe modern --batch-tokens 250
refused 'heads' --recipe modern --heads 3
refused 'layers' --recipe unet --layers 3
refused 'recipe' --recipe nonesuch
head -c 1000 "$work"/text_train_000001.bin > "$work/short.bin"
refused 'short.bin' --recipe modern --train "$work/short.bin"
refused 'nothing' --recipe modern --train "$work/nothing*.bin"
refused 'vocab|token' --recipe modern --vocab 64

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
