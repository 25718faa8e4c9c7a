#!/usr/bin/env bash
# Every test in every build: fp32, bf16, other orders of execution, the sanitizers, the full size, nvcc where it
# is installed. Adds up the closing lines "N passed, N failed[, N skipped]" of the parts; a part that does not
# build or dies counts as one failure.
set -u
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0 skipped=0
jobs=$(nproc 2> /dev/null || echo 2)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

part() {      # part TITLE COMMAND...
    local title="$1" status line p f s start=$SECONDS; shift
    echo "== $title"
    "$@" 2>&1 | tee "$log" | grep -aE --line-buffered '^(FAIL|skip|note) |passed, .* s\)$' | sed -u 's/^/   /'
    status=${PIPESTATUS[0]}
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -1)
    if [ -z "$line" ]; then
        tail -20 "$log"
        echo "   FAIL  $title: no closing line, exit status $status"
        failed=$((failed + 1))
        return
    fi
    read -r p f s <<< "$(sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/' <<< "$line")"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then
        tail -5 "$log"
        echo "   FAIL  $title: exit status $status"
        failed=$((failed + 1))
    fi
    echo "   $line   ($((SECONDS - start)) s)"
}

part "fp32"                   make -s -j"$jobs" test PRECISION=fp32
part "bf16"                   make -s -j"$jobs" test PRECISION=bf16
part "orders of execution"    make -s -j"$jobs" test-orders PRECISION=fp32
part "124M parameters"        make -s -j"$jobs" test-124m PRECISION=fp32
part "address sanitizer"      make -s -j"$jobs" test SAN=address PRECISION=fp32
part "mutated input, a minute" make -s fuzz SAN=address PRECISION=fp32
part "undefined sanitizer"    make -s -j"$jobs" test SAN=undefined PRECISION=bf16
part "thread sanitizer"       make -s -j"$jobs" test SAN=thread PRECISION=fp32
part "nvcc"                   test/nvcc.sh

echo "$((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
