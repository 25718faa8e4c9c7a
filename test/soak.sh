#!/usr/bin/env bash
# test/soak.sh PROGRAM [KILLS [SEED]]: 300 steps on two ranks, ended by SIGKILL KILLS times (50) and started again each time with the
# same command and --resume auto. The weights, the checkpoints and the losses are those of a run that nobody disturbed, bit for bit.
#   Four kinds of kills take turns: of all processes within a checkpoint's write, which is slowed down for that; of all between two
#   steps; of all while they start; of one rank in place of a random call on a checkpoint's files (test/faulty_files.c).
#   After each the newest directory that has a checkpoint's name is what the next start goes on from: it is whole.
# The text is tinyshakespeare where data/ has its shards, else this repository's own.
set -u
program=$(realpath "$1")
kills=${2:-50}
tools=$(dirname "$program")
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
launcher="" pids=()
trap '[ -z "$launcher" ] || kill -9 "$launcher" "${pids[@]}" 2> /dev/null; rm -rf "$work"' EXIT
passed=0 failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOST_THREADS=1 TMPDIR="$work/tmp"      # where Open MPI keeps its files: what a killed one leaves is removed
mkdir "$TMPDIR"
seed=${3:-${SEED:-$((16#$(od -An -tx2 -N2 /dev/urandom | tr -d ' ')))}}
RANDOM=$seed

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
milliseconds() { local t=${EPOCHREALTIME/[.,]/}; echo $((t / 1000)); }
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never"; }      # sleep without a process: kills are to hit what lasts milliseconds
pause_ms() { pause "$(printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)))"; }
alive() {      # alive PID: there, and not only waiting for its parent to notice its end
    local line=""
    { read -r line < "/proc/$1/stat"; } 2> /dev/null
    line=${line##*) }
    [ -n "$line" ] && [ "${line:0:1}" != Z ]
}
variable() {      # variable PID NAME: of a process's environment
    local all entry
    mapfile -d '' -t all 2> /dev/null < "/proc/$1/environ"
    for entry in ${all[@]+"${all[@]}"}; do [ "${entry%%=*}" = "$2" ] && echo "${entry#*=}"; done
}
tensor_bytes() {      # a safetensors file without its header, which names the output directory
    local header; header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
    tail -c +$((9 + header)) "$1"
}
losses() { sed -nE 's/.*"event":"(train|val)","step":([0-9]+).*"(train|val)_loss":([0-9.e+-]+).*/\1 \2 \4/p' "$1/log.jsonl"; }

job=""             # of mpirun: names what it leaves in /dev/shm

# ---- the run -------------------------------------------------------------------------------
data=data/tinyshakespeare
if ! [ -s ${data}_train_000001.bin ] || ! [ -s ${data}_val_000000.bin ]; then
    data="$work/text"
    "$tools/text_to_shards" --out "$data" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
fi
every=10 steps=300
# Of all recipes normuon keeps the most from step to step: second moments, Adam's gradients between its steps, YaRN, windows.
line=(--recipe normuon --layers 4 --heads 2 --channels 64 --vocab 320 --seq-len 32 --micro-batch 1 --batch-tokens 128 --epochs 0
      --steps "$steps" --extension-steps 6 --val-every 50 --val-tokens 256 --val-seq-len 32 --val-batch 1 --batching stream
      --no-layers "" --no-attention "" --value-embeds "0:0 3:0" --gated-skips "1>2" --backout 2 --window-block 8 --long-layers "1 3"
      --window-steps "1 2 3" --window-extension 4 --window-final 0 --muon-momentum-warmup 30 --muon-momentum-cooldown 7
      --train "${data}_train_*.bin" --val "${data}_val_*.bin" --checkpoint-every "$every" --keep 2 --keep-every 100 --resume auto)
slow=(FAULT_UNDER=/checkpoints "FAULT_CALLS=open,write,fsync,close,rename,mkdir,unlink,rmdir" FAULT_DELAY=1000)

start() {      # start OUT VARIABLE=VALUE...: two ranks; leaves mpirun's pid in $launcher
    local out="$1"; shift
    : > "$work/err.txt"
    touch "$work/start"
    env LD_PRELOAD="$tools/faulty_files.so" "$@" mpirun -np 2 "$program" "${line[@]}" --out "$out" > "$work/out.txt" 2> "$work/err.txt" &
    launcher=$! pids=() limit=$((SECONDS + 120))
}
running() { alive "$launcher" && [ $SECONDS -lt $limit ]; }      # nothing here may take two minutes
find_ranks() {      # their pids into $pids
    local pid
    pids=()
    for pid in $(pgrep -P "$launcher"); do [ -n "$(variable "$pid" OMPI_COMM_WORLD_RANK)" ] && pids+=("$pid"); done
}
gone() {      # gone WHAT: all end within 30 s; $status is mpirun's
    local from pid left
    from=$(milliseconds)
    while :; do
        left=()
        for pid in "$launcher" ${pids[@]+"${pids[@]}"}; do alive "$pid" && left+=("$pid"); done
        [ ${#left[@]} -eq 0 ] || [ $(($(milliseconds) - from)) -ge 30000 ] && break
        pause 0.01
    done
    [ ${#left[@]} -eq 0 ]; check $? "$1: all gone within 30 s (left: ${left[*]})"
    [ ${#left[@]} -gt 0 ] && kill -9 "${left[@]}"
    wait "$launcher" 2> /dev/null
    status=$?
    [ -n "$job" ] && find /dev/shm -name "*.$(printf %x "$job").*" -delete 2> /dev/null
    rm -rf "${TMPDIR:?}"/*
    launcher="" job=""
}
last_step() {      # of this start's log in OUT into $step; -1: none
    local lines i
    step=-1 lines=()
    [ "$1/log.txt" -nt "$work/start" ] || return
    mapfile -t lines 2> /dev/null < "$1/log.txt"
    for ((i = ${#lines[@]} - 1; i >= 0; i--)); do
        if [[ "${lines[i]}" =~ ^step:([0-9]+)/ ]]; then step=${BASH_REMATCH[1]}; return; fi
    done
}
newest() {      # the step of the newest directory that has a checkpoint's name into $checkpoint; 0: none
    local path
    checkpoint=0
    for path in "$1"/checkpoints/step_*; do [ -d "$path" ] && checkpoint=$((10#${path##*step_})); done
}

writes() {      # whether a checkpoint of this start is half-written
    local path
    for path in "$1"/checkpoints/.step_*.tmp; do [ "$path" -nt "$work/start" ] && return; done
    return 1
}
half() { ls -di "$1"/checkpoints/.step_* 2> /dev/null; }      # what is half-written or half-removed

# ---- undisturbed ---------------------------------------------------------------------------
start "$work/whole" "${slow[@]}"
while running; do pause 0.05; done
gone "the run that nobody disturbs"
check $status "the run that nobody disturbs ends with 0 (got $status): $(head -2 "$work/err.txt" | tr '\n' ' ')"
[ "$(losses "$work/whole" | wc -l)" -eq $((steps + steps / 50 + 1)) ]; check $? "it logs a loss for each step"
[ $failed -eq 0 ] || { echo "$passed passed, $failed failed"; exit 1; }
write_ms=$(sed -nE 's/.*"event":"checkpoint".*"write_ms":([0-9]+).*/\1/p' "$work/whole/log.jsonl" | sort -n | sed -n "$((steps / every / 2))p")

same_as_whole() {      # same_as_whole OUT: everything that was computed
    local out="$1" path file
    cmp -s <(tensor_bytes "$work/whole/model.safetensors") <(tensor_bytes "$out/model.safetensors"); check $? "equal weights"
    cmp -s <(losses "$work/whole") <(losses "$out"); check $? "equal losses: $(diff <(losses "$work/whole") <(losses "$out") | head -3)"
    [ "$(ls "$work/whole/checkpoints")" = "$(ls "$out/checkpoints")" ]
    check $? "the same checkpoints: $(ls -x "$work/whole/checkpoints") and $(ls -x "$out/checkpoints")"
    [ -z "$(find "$out" -name '.*' -not -path "$out")" ]; check $? "nothing half-written is left: $(find "$out" -name '.*')"
    for path in "$work/whole/checkpoints"/*; do
        for file in "$path"/*.safetensors; do
            cmp -s <(tensor_bytes "$file") <(tensor_bytes "$out/checkpoints/${path##*/}/${file##*/}")
            check $? "equal tensors: ${path##*/}/${file##*/}"
        done
        cmp -s <(grep '"kind":' "$path/manifest.json") <(grep '"kind":' "$out/checkpoints/${path##*/}/manifest.json")
        check $? "equal lists of tensors and sums: ${path##*/}"
    done
}

# ---- kills ---------------------------------------------------------------------------------
run=1 hits=0 writing=0 starting=0 calls=0 removing=0 goes=0
out="$work/run-1"
begun=$(milliseconds)
while [ $hits -lt "$kills" ] && [ $failed -eq 0 ]; do
    goes=$((goes + 1))
    [ $goes -le $((2 * kills + 20)) ]; check $? "kills hit: $hits of $goes"
    kind=$((goes % 4)) faults=("${slow[@]}")
    # The moments are spread over the run: what is lost by one must be made up before the next.
    goal=$((hits * (steps - 3 * every) / kills % (steps - 3 * every) + RANDOM % every))
    case $kind in
        3) rank=$((RANDOM % 2)) call=$((1 + RANDOM % 60)) of=write      # a checkpoint takes some 80 on rank 0
           if [ $((RANDOM % 2)) -eq 0 ]; then call=$((1 + RANDOM % 20)) of=fsync,rename,mkdir,unlink,rmdir; fi
           what="rank $rank at call $call of $of"
           faults=(FAULT_UNDER=/checkpoints "FAULT_RANK=$rank" "FAULT_AT=$call" "FAULT_CALLS=$of" FAULT_ERROR=kill) ;;
        2) delay=$((RANDOM % 700)) what="all $delay ms after the start" ;;
        1) delay=$((RANDOM % 40)) what="all $delay ms after step $goal" ;;
        0) delay=$((RANDOM % (${write_ms:-0} * 2 / 3 + 1))) what="all $delay ms after the start of a write behind step $goal" ;;
    esac
    what="kill $((hits + 1)), $what"
    newest "$out"; before=$checkpoint parts=$(half "$out")
    start "$out" "${faults[@]}"
    if [ $kind -ge 2 ]; then
        if [ $kind -eq 2 ]; then pause_ms $delay; else while running; do pause 0.02; done; fi
    else
        while last_step "$out"; running && [ "$step" -lt $goal ]; do pause 0.005; done
        if [ $kind -eq 0 ]; then
            while running && ! writes "$out"; do pause 0.002; done
        fi
        pause_ms $delay
    fi
    [ $SECONDS -lt $limit ]; check $? "$what: within two minutes"
    kill -STOP "$launcher" 2> /dev/null      # starts no more ranks
    find_ranks
    [ ${#pids[@]} -gt 0 ] && job=$(variable "${pids[0]}" PMIX_NAMESPACE)
    kill -9 "$launcher" ${pids[@]+"${pids[@]}"} 2> /dev/null
    gone "$what" 2> /dev/null      # without what bash says about it
    # What this start went on from.
    if from=$(sed -nE 's/^(# )?resumed from .*: step ([0-9]+),.*/\2/p' "$work/out.txt") && [ -n "$from" ]; then
        [ "$from" -eq "$before" ]; check $? "$what: it had gone on from step $from, the newest was $before"
    fi
    ! grep -aqE 'passes over|none of the checkpoints' "$work/out.txt" "$work/err.txt"
    check $? "$what: no checkpoint is refused: $(head -3 "$work/err.txt")"
    newest "$out"
    [ $checkpoint -ge "$before" ]; check $? "$what: the newest checkpoint is that of step $checkpoint, and was $before"
    [ -n "${VERBOSE:-}" ] && echo "note  $what: from $before to $checkpoint, status $status, $(ls -x -A "$out/checkpoints" 2> /dev/null)"
    if [ $status -eq 0 ]; then      # it was done before
        same_as_whole "$out"
        rm -rf "$out"
        run=$((run + 1)) out="$work/run-$run"
        continue
    fi
    [ $status -eq 137 ] || [ $kind -eq 3 ]; check $? "$what: killed (status $status: $(head -2 "$work/err.txt"))"
    hits=$((hits + 1))
    now=$(half "$out")
    if [ "$now" != "$parts" ]; then      # and not only not yet swept
        case "$now" in *.old) removing=$((removing + 1)) ;; *.tmp) writing=$((writing + 1)) ;; esac
    fi
    case $kind in 2) starting=$((starting + 1)) ;; 3) calls=$((calls + 1)) ;; esac
done
start "$out"
while running; do pause 0.05; done
gone "the last start"
check $status "the last start ends with 0 (got $status): $(head -2 "$work/err.txt" | tr '\n' ' ')"
same_as_whole "$out"
echo "note  $hits kills of $run run(s) in $((($(milliseconds) - begun) / 1000)) s: $writing left a half-written checkpoint, $removing a" \
     "half-removed one, $starting came while it started, $calls in place of a call. SEED=$seed"
[ "$hits" -ge "$kills" ]; check $? "all kills hit"
[ $writing -ge $((kills / 5)) ]; check $? "a fifth of them within a write"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
