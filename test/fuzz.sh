#!/usr/bin/env bash
# test/fuzz.sh SECONDS PROGRAM...: runs `PROGRAM fuzz SECONDS SEED` of all programs at the same time and adds up their closing lines.
# The seed is that of the commit, so that a failure comes again and each commit looks elsewhere; FUZZ_SEED is another.
# RUN_UNDER is put before each command, as in test/run.sh.
set -u
seconds="$1"; shift
seed=${FUZZ_SEED:-$(git rev-parse HEAD 2> /dev/null | cksum | cut -d' ' -f1)}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
read -r -a under <<< "${RUN_UNDER:-}"
passed=0 failed=0 pids=()
for program in "$@"; do
    # What hangs in spite of its own alarm ends a minute late, with a failure.
    "${under[@]}" timeout -k 5 $((seconds + 60)) "$program" fuzz "$seconds" "$seed" > "$folder/${program##*/}" 2>&1 &
    pids+=($!)
done
for program in "$@"; do
    status=0
    wait "${pids[0]}" || status=$?
    pids=("${pids[@]:1}")
    output="$folder/${program##*/}"
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$output" | tail -1)
    grep -a '^FAIL' "$output"
    printf '%-50s %s   (%d s)\n' "${program##*/} fuzz, seed $seed" "${line:-no closing line}" "$SECONDS"
    grep -aE '^      [0-9]+ ' "$output"
    [ $status -eq 0 ] || grep -aE 'ERROR: |runtime error: |, seed |^    #[0-5] ' "$output" | head -12
    if [ -z "$line" ] || { [ $status -ne 0 ] && [[ "$line" == *" 0 failed"* ]]; }; then
        echo "FAIL  ${program##*/} fuzz $seconds $seed: exit status $status"
        failed=$((failed + 1))
    fi
    [ -z "$line" ] && continue
    read -r p f <<< "$(sed -E 's/^([0-9]+) passed, ([0-9]+) failed.*/\1 \2/' <<< "$line")"
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
