#!/usr/bin/env bash
# Every test in every build: fp32, bf16, the sanitizers, nvcc where it is installed. Adds up the closing
# lines "N passed, N failed[, N skipped]" of the parts; a part that does not build or dies counts as one failure.
set -u
cd "$(dirname "$0")/.."
passed=0 failed=0 skipped=0

part() {      # part TITLE COMMAND...
    local title="$1" log status=0 start=$SECONDS; shift
    log=$(mktemp)
    echo "== $title"
    "$@" > "$log" 2>&1 || status=$?
    local line p f s
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -1)
    grep -E '^(FAIL|skip)' "$log"
    if [ -z "$line" ]; then
        tail -20 "$log"
        echo "FAIL  $title: no closing line, exit status $status"
        failed=$((failed + 1))
    else
        read -r p f s <<< "$(echo "$line" | sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/')"
        passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
        if [ $status -ne 0 ] && [ "$f" -eq 0 ]; then
            tail -5 "$log"
            echo "FAIL  $title: exit status $status"
            failed=$((failed + 1))
        fi
        echo "   $line   ($((SECONDS - start)) s)"
    fi
    rm -f "$log"
}

part "fp32"                   make -s test PRECISION=fp32
part "bf16"                   make -s test PRECISION=bf16
part "address sanitizer"      make -s test SAN=address
part "undefined sanitizer"    make -s test SAN=undefined PRECISION=bf16
part "thread sanitizer"       make -s test SAN=thread
part "nvcc"                   test/nvcc.sh

echo
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
