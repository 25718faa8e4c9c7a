#!/usr/bin/env bash
# test/run.sh PROGRAM...: runs test programs one after another and adds up their closing lines.
# Arguments of a program follow it after commas: build/fp32/test_golden,test/golden/r8_micro64
set -u
passed=0 failed=0 skipped=0
for program in "$@"; do
    IFS=, read -r -a command <<< "$program"
    status=0 start=$SECONDS
    output=$("${command[@]}" 2>&1) || status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' <<< "$output" | tail -1)
    grep -E '^(FAIL|skip)' <<< "$output"
    printf '%-28s %s   (%d s)\n' "$(basename "${command[0]}")" "${line:-no closing line}" $((SECONDS - start))
    if [ -z "$line" ] || { [ $status -ne 0 ] && [[ "$line" == *" 0 failed"* ]]; }; then
        tail -20 <<< "$output"
        echo "FAIL  ${command[*]}: exit status $status"
        failed=$((failed + 1))
    fi
    [ -z "$line" ] && continue
    read -r p f s <<< "$(sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/' <<< "$line")"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
done
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
