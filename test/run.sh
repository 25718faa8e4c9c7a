#!/usr/bin/env bash
# test/run.sh COMMAND...: runs test programs one after another and adds up their closing lines.
# Arguments follow the program after commas: build/fp32/test_golden,test/golden/r8_micro64
# np=3:PROGRAM runs it as three ranks under mpirun, one OS thread each, stopped after ten minutes.
# RUN_UNDER is put before each command: RUN_UNDER="env HOST_SCHED=reverse" test/run.sh build/fp32/test_kernels
set -u
title() {      # title WORD...: the command without folders, at most 48 letters
    local text; text=$(printf '%s ' "${@##*/}")
    text=${text#env } text=${text% }
    [ ${#text} -le 48 ] || text="${text:0:44} ..."
    echo "$text"
}
# What Open MPI wants to be told on a machine with fewer cores than ranks, and where root runs the tests.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
read -r -a under <<< "${RUN_UNDER:-}"
passed=0 failed=0 skipped=0
for command in "$@"; do
    launch=()
    if [[ "$command" == np=*:* ]]; then
        ranks=${command%%:*} command=${command#*:}
        launch=(timeout -k 10 600 env HOST_THREADS=1 mpirun -np "${ranks#np=}")
    fi
    IFS=, read -r -a words <<< "$command"
    status=0 start=$SECONDS
    output=$("${under[@]}" "${launch[@]}" "${words[@]}" 2>&1) || status=$?
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' <<< "$output" | tail -1)
    grep -aE '^(FAIL|skip)' <<< "$output"
    printf '%-50s %s   (%d s)\n' "$(title "${words[@]}")${launch:+, $ranks}" "${line:-no closing line}" $((SECONDS - start))
    if [ -z "$line" ] || { [ $status -ne 0 ] && [[ "$line" == *" 0 failed"* ]]; }; then
        tail -20 <<< "$output"
        echo "FAIL  ${words[*]}: exit status $status"
        failed=$((failed + 1))
    fi
    [ -z "$line" ] && continue
    read -r p f s <<< "$(sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/' <<< "$line")"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
done
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
