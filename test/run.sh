#!/usr/bin/env bash
# test/run.sh COMMAND...: runs test programs one after another and adds up their closing lines.
# Arguments follow the program after commas: build/fp32/test_golden,test/golden/r8_micro64
# np=3:PROGRAM runs it as three ranks under mpirun, one OS thread each, stopped after ten minutes.
# beside:COMMAND runs it while the others run, one such after another: for tests that mostly wait.
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
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

words_of() { IFS=, read -r -a words <<< "$1"; }
execute() {      # execute NUMBER COMMAND [RANKS]: what it prints into $folder/NUMBER, its status and seconds beside it
    local launch=() words status=0 start=$SECONDS
    [ -n "${3:-}" ] && launch=(timeout -k 10 600 env HOST_THREADS=1 mpirun -np "$3")
    words_of "$2"
    "${under[@]}" "${launch[@]}" "${words[@]}" > "$folder/$1" 2>&1 < /dev/null || status=$?
    echo "$status $((SECONDS - start))" > "$folder/$1.status"
}
report() {      # report NUMBER COMMAND [RANKS]: adds up, and shows what failed
    local output="$folder/$1" words status seconds line p f s
    words_of "$2"
    read -r status seconds < "$folder/$1.status"
    line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed' "$output" | tail -1)
    grep -aE '^(FAIL|skip)' "$output"
    printf '%-50s %s   (%d s)\n' "$(title "${words[@]}")${3:+, np=$3}" "${line:-no closing line}" "$seconds"
    if [ -z "$line" ] || { [ "$status" -ne 0 ] && [[ "$line" == *" 0 failed"* ]]; }; then
        tail -20 "$output"
        echo "FAIL  ${words[*]}: exit status $status"
        failed=$((failed + 1))
    fi
    [ -z "$line" ] && return
    read -r p f s <<< "$(sed -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?.*/\1 \2 \4/' <<< "$line")"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
}

commands=() ranks=() beside=()
for command in "$@"; do
    number=${#commands[@]} of=""
    if [[ "$command" == beside:* ]]; then command=${command#*:}; beside+=("$number"); fi
    if [[ "$command" == np=*:* ]]; then of=${command%%:*} of=${of#np=} command=${command#*:}; fi
    commands+=("$command") ranks+=("$of")
done
(for number in ${beside[@]+"${beside[@]}"}; do execute "$number" "${commands[number]}" "${ranks[number]}"; done) &
for number in "${!commands[@]}"; do
    [[ " ${beside[*]-} " == *" $number "* ]] && continue
    execute "$number" "${commands[number]}" "${ranks[number]}"
    report "$number" "${commands[number]}" "${ranks[number]}"
done
wait
for number in ${beside[@]+"${beside[@]}"}; do report "$number" "${commands[number]}" "${ranks[number]}"; done
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
