#!/usr/bin/env bash
# Every test in every build: fp32, bf16, other orders of execution, the sanitizers, the full size, nvcc where it
# is installed. Adds up the closing lines "N passed, N failed[, N skipped]" of the parts; a part that does not
# build or dies counts as one failure. While one part runs the later ones are compiled at low priority: tests wait a
# lot, or keep one core busy.
set -u
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0 skipped=0
jobs=$(nproc 2> /dev/null || echo 2)
folder=$(mktemp -d)
log=$folder/log

# ---- what is compiled ahead ----------------------------------------------------------------
order=("bf16" "address sanitizer" "undefined sanitizer" "thread sanitizer" "nvcc")
declare -A compile=(
    ["bf16"]="make -s -j$jobs tests PRECISION=bf16"
    ["address sanitizer"]="make -s -j$jobs tests SAN=address PRECISION=fp32"
    ["undefined sanitizer"]="make -s -j$jobs tests SAN=undefined PRECISION=bf16"
    ["thread sanitizer"]="make -s -j$jobs tests SAN=thread PRECISION=fp32"
    ["nvcc"]="test/nvcc.sh"
)
compile_ahead() {      # what fails here is compiled again by its part, which shows why
    local title command
    for title in "${order[@]}"; do
        read -r -a command <<< "${compile[$title]}"
        nice -n 19 "${command[@]}"
        : > "$folder/$title"
    done
}
set -m                                    # a process group of its own, by which it is ended
compile_ahead > /dev/null 2>&1 < /dev/null &
ahead=$!
set +m
trap 'kill -- -$ahead 2> /dev/null; rm -rf "$folder"' EXIT
compiled() {      # compiled TITLE: waits until it is, or has failed
    [ -n "${compile[$1]:-}" ] || return
    while ! [ -e "$folder/$1" ] && kill -0 $ahead 2> /dev/null; do sleep 0.1; done
}

# ---- the parts -----------------------------------------------------------------------------
part() {      # part TITLE COMMAND...
    local title="$1" status line p f s start=$SECONDS; shift
    echo "== $title"
    compiled "$title"
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
