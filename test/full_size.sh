#!/usr/bin/env bash
# test/full_size.sh PROGRAM: the recipe `modern` with its 124M parameters, three short steps on the CPU, on shards made
# from this repository's own text: it runs, it learns, and the memory it took is what its table says, within 5 %.
set -u
program=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0
check() {      # check NAME STATUS: 0 passes
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $1"; failed=$((failed + 1)); fi
}
holds() { awk "BEGIN { exit !($1) }"; }      # holds CONDITION: a comparison of decimal numbers; of words too, which fail

free_kb=$(sed -nE 's/^MemAvailable: *([0-9]+) kB/\1/p' /proc/meminfo 2> /dev/null)
if [ "${free_kb:-4000000}" -lt 3200000 ]; then
    echo "skip  124M parameters: takes about 2.7 GiB of memory, $((free_kb / 1024)) MiB are free"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$(dirname "$program")/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh llmc/*.h > /dev/null; check "text_to_shards" $?
"$program" --recipe modern --micro-batch 4 --seq-len 256 --batch-tokens 2048 --steps 3 --val-tokens 2048 --batching stream \
    --train "$work/text_train_*.bin" --val "$work/text_val_*.bin" --out "$work/run" > "$work/output.txt" 2>&1
status=$?
check "the run ends well (exit $status): $(tail -1 "$work/output.txt")" $status
grep -q '^parameters 123568128,' "$work/output.txt"; check "has 123,568,128 parameters" $?

log="$work/run/log.txt"
read -r first last <<< "$(sed -nE 's/^step:[0-9]+\/3 val_loss:([0-9.]+) .*/\1/p' "$log" | tr '\n' ' ')"
[ -n "${last:-}" ] && holds "$last < $first - 1"; check "validation loss falls by more than 1: ${first:-none} to ${last:-none}" $?
bytes=$(stat -c %s "$work/run/model.safetensors")
[ "${bytes:-0}" -gt $((4 * 123568128)) ]; check "model.safetensors holds all parameters in fp32: ${bytes:-0} bytes" $?
read -r table peak <<< "$(sed -nE 's/^memory: ([0-9.]+) MiB by the table, process peak ([0-9.]+) MiB.*/\1 \2/p' "$log")"
[ -n "${peak:-}" ] && holds "$peak < 1.05 * $table && $peak > 0.95 * $table"
check "process peak ${peak:-none} MiB is within 5 % of the table's ${table:-none} MiB" $?
echo "note  $(sed -nE 's/^step:3\/3 val_loss.*step_avg:([0-9.]+)ms$/\1/p' "$log") ms per step of 2048 tokens;" \
     "peak $peak MiB, $table MiB by the table"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
