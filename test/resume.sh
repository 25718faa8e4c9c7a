#!/usr/bin/env bash
# test/resume.sh PROGRAM [short]: runs that stop and go on, on shards made from this repository's own text.
#   every recipe, and all by Adam: what goes on from a checkpoint of any step ends with the bits of the run that did not stop: weights,
#   state, losses, norms; so does a run without checkpoints
#   other numbers of ranks, --zero 0 and 1: the losses of the run that did not change
#   --resume auto in the run's own folder: its log goes on; a broken checkpoint is passed over by name and reason
#   flags and data that differ; a folder that holds a run; signals: all ranks end with 75, and a second Ctrl-C at once with 130
# short: two recipes, few steps and ranks, for other builds.
set -u
program=$(realpath "$1")
short=${2:-}
tools=$(dirname "$program")
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
# What Open MPI wants to be told on a machine with fewer cores than ranks, and where root runs the tests.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOST_THREADS=1

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
has() { grep -qE -- "$3" "$2"; check $? "$1: $3 (found: $(head -c 300 "$2" | head -3 | tr '\n' ' '))"; }      # has NAME FILE REGEX
tensor_bytes() {      # a safetensors file without its header, which names the output directory
    local header; header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
    tail -c +$((9 + header)) "$1"
}
same_tensors() { [ -s "$2" ] && [ -s "$3" ] && cmp -s <(tensor_bytes "$2") <(tensor_bytes "$3"); check $? "$1: $(basename "$3")"; }
point() { printf '%s/%s/checkpoints/step_%06d' "$work" "$1" "$2"; }      # point RUN STEP: a checkpoint's folder
# Steps and evaluations behind STEP, to all digits and without times. The last line of a step counts.
events() {      # events RUN STEP
    sed -E 's/"(train_ms|step_avg_ms)":[^,}]*,?//g' "$work/$1/log.jsonl" |
        awk -F'"step":' -v from="$2" '/"event":"(train|val)"/ && $2 + 0 > from'
}
losses() { events "$1" "$2" | sed -nE 's/.*"event":"([a-z]*)","step":([0-9]+).*"(train|val)_loss":([^,}]*).*/\1 \2 \4/p'; }
lines() { grep -E '^(step:|RESULT)' "$work/$1/$2" | sed -E 's/(train_time|step_avg):[0-9.]+ms//g'; }      # lines RUN LOG

"$tools/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
base=(--layers 2 --heads 2 --channels 64 --vocab 320 --seq-len 32 --micro-batch 2 --batch-tokens 256 --val-tokens 500 --val-every 3
      --steps 8 --epochs 0 --checkpoint-every 8 --train "$work/text_train_*.bin" --val "$work/text_val_*.bin")
# What changes on the way changes within these eight steps: windows after 1, 3, 5, 7 (sub3), or after 2 and 4, the last two steps
# having another (normuon, whose Adam waits at odd steps); momentum until step 3; epochs.
late=(--layers 12 --table-rows 0 --seq-len 64 --micro-batch 1 --val-seq-len 64 --window-block 8 --window-max 32
      --muon-momentum-warmup 3)
last=("${late[@]}" --window-max 1728 --window-steps "1 2 3" --window-extension 4 --window-final 6 --extension-steps 2
      --muon-momentum-cooldown 2)
flags() {      # flags NAME FLAGS...: those of a run into $work/NAME; of a flag that stands there more than once the last
    local name="$1" i all; shift
    all=("${base[@]}" --out "$work/$name" "$@")
    declare -A value=()
    for ((i = 0; i < ${#all[@]}; i += 2)); do value[${all[i]}]=${all[i + 1]}; done
    line=()
    for i in "${!value[@]}"; do line+=("$i" "${value[$i]}"); done
}
# No run here may take a minute: one that hangs ends with 124.
run() {      # run NAME RANKS FLAGS...: what it prints into $work/NAME.txt, what it complains of into $work/NAME.err
    local name="$1" ranks="$2" launch=(); shift 2
    flags "$name" "$@"
    [ "$ranks" -eq 1 ] || launch=(mpirun -np "$ranks")
    timeout -k 10 60 "${launch[@]}" "$program" "${line[@]}" > "$work/$name.txt" 2> "$work/$name.err"
}
run_well() { run "$@"; local status=$?; check $status "$1: ends well (exit $status): $(head -3 "$work/$1.err" | tr '\n' ' ')"; }
refused() {      # refused NAME REGEX RANKS FLAGS...: exit 1, one message, which says that
    local name="$1" words="$2" status; shift 2
    run "$name" "$@"; status=$?
    [ $status -eq 1 ]; check $? "$name: exit 1 (got $status)"
    [ "$(grep -c '^train_gpt2: ' "$work/$name.err")" -eq 1 ]; check $? "$name: one message: $(grep '^train_gpt2: ' "$work/$name.err")"
    has "$name" "$work/$name.err" "$words"
}

# ---- from any step, by as many ranks -------------------------------------------------------
equal() {      # equal NAME RUN STEP RANKS: run NAME, which went on from STEP of RUN, is as RUN from there on
    local rank state
    [ -n "$(events "$2" "$3")" ] && cmp -s <(events "$2" "$3") <(events "$1" "$3")
    check $? "$1: losses and norms behind step $3: $(diff <(events "$2" "$3") <(events "$1" "$3") | head -2 | cut -c 1-200 | tr '\n' ' ')"
    same_tensors "$1" "$work/$2/model.safetensors" "$work/$1/model.safetensors"
    for ((rank = 0; rank < $4; rank++)); do
        state=state.rank$rank.safetensors
        same_tensors "$1" "$(point "$2" 8)/$state" "$(point "$1" 8)/$state"
    done
}
recipe_flags() {      # recipe_flags NAME: into $these, and the steps to go on from into $steps
    these=(--recipe "$1")
    steps="1 3 6"
    case $1 in
        adamw) these=(--recipe modern --optimizer adamw --weight-decay 0.1) ;;
        sub3) these+=("${late[@]}"); steps="1 4 5" ;;
        sub3_20) these+=("${late[@]}"); steps="3" ;;
        normuon) these+=("${last[@]}"); steps="1 2 3 4 5 6 7" ;;
    esac
    [ -z "$short" ] || { steps="3"; [ "$1" = normuon ] && steps="3 4"; }
}
recipes="modern untied unet sub3_20 sub3 normuon adamw"
[ -z "$short" ] || recipes="modern normuon"
for recipe in $recipes; do
    recipe_flags "$recipe"
    run_well "$recipe" 1 "${these[@]}" --checkpoint-every 1 --keep 100
    [ -d "$(point "$recipe" 1)" ] && [ -d "$(point "$recipe" 8)" ]; check $? "$recipe: a checkpoint after each step"
    if [ -z "$short" ] && [[ $recipe == modern || $recipe == normuon ]]; then
        run_well "$recipe-none" 1 "${these[@]}" --checkpoint-every 0
        ! [ -e "$work/$recipe-none/checkpoints" ]; check $? "$recipe: --checkpoint-every 0 makes none"
        cmp -s <(events "$recipe" 0) <(events "$recipe-none" 0); check $? "$recipe: checkpoints change no loss"
        same_tensors "$recipe: checkpoints change nothing" "$work/$recipe/model.safetensors" "$work/$recipe-none/model.safetensors"
    fi
    for step in $steps; do
        run_well "$recipe-$step" 1 "${these[@]}" --resume "$(point "$recipe" "$step")"
        equal "$recipe-$step" "$recipe" "$step" 1
    done
done
# Also in other orders of execution, and gone on with twice.
recipe_flags normuon
HOST_STREAMS=lazy HOST_SCHED=7 run_well lazy 1 "${these[@]}" --resume "$(point normuon 3)" --checkpoint-every 2
equal lazy normuon 3 1
run_well twice 1 "${these[@]}" --resume "$(point lazy 6)"
equal twice normuon 6 1
for ranks in 2 3; do
    [ -n "$short" ] && [ $ranks -eq 3 ] && continue
    zero=$((ranks % 2))       # 2 ranks: all state on each
    run_well ranks-$ranks $ranks "${these[@]}" --batch-tokens 384 --zero $zero --checkpoint-every 3 --keep 9
    run_well ranks-$ranks-3 $ranks "${these[@]}" --batch-tokens 384 --zero $zero --resume "$(point ranks-$ranks 3)"
    equal ranks-$ranks-3 ranks-$ranks 3 $((zero ? ranks : 1))
done
precision=$(sed -nE 's/^parameters .*, (fp32|bf16)$/\1/p' "$work/modern.txt")
[ -n "$precision" ]; check $? "prints its precision"

# ---- other numbers of ranks ----------------------------------------------------------------
# Tables and heads in fp32: what is rounded to 8 or 16 bits would turn the last bit of a sum into more than the promise of 1e-5, which
# holds in fp32. In bf16 gradients are rounded to be sent: off by (N+1) 2^-9 of themselves, and the descent by as much (test/ranks.sh).
close() {      # close NAME RUN STEP RANKS
    local words
    words=$(paste -d' ' <(losses "$2" "$3") <(losses "$1" "$3") | awk -v precision="$precision" -v ranks="$4" -v first="$(losses one 0 | head -1 | cut -d' ' -f3)" '
        NR == 1 { lowest = first }
        { if ($3 < lowest) lowest = $3
          allowed = precision == "bf16" ? (ranks + 1) / 512 * (first - lowest) + 2e-4 : 1e-5 * $3
          off = $6 - $3; if (off < 0) off = -off
          if (off / allowed > worst) worst = off / allowed
          if (NF != 6 || $2 != $5 || !(off <= allowed)) bad++ }
        END { printf "%d losses, the farthest at %.3f of what is allowed, %d beyond", NR, worst, bad; exit !(NR > 4 && bad == 0) }')
    check $? "$1: near those of $2: $words"
    [ -n "${VERBOSE:-}" ] && echo "note  $1: $words"
}
these=(--recipe normuon "${last[@]}" --batch-tokens 1536 --bf16-tables 0 --bf16-head 0 --fp8-head 0 --bf16-state 0 --batching stream)
# From step 3 to step 5, at which Adam waits too, and on from there.
one_to="2:1 3:0 8:1"
other_to="2:1>1:1 2:1>3:1 2:1>2:0 3:0>2:1 3:0>8:1 8:1>1:1 8:1>3:0"
[ -z "$short" ] || { one_to="2:1" other_to="2:1>1:1"; }
run_well one 1 "${these[@]}" --checkpoint-every 3 --keep 9
for to in $one_to; do
    run_well "$to" "${to%:*}" "${these[@]}" --zero "${to#*:}" --resume "$(point one 3)" --checkpoint-every 5
    close "$to" one 3 "${to%:*}"
    grep -q 'saved by 1 rank,' "$work/$to/log.txt"; check $? "$to: says of how many ranks it was"
done
for way in $other_to; do
    from=${way%>*} to=${way#*>}
    run_well "$from-$to" "${to%:*}" "${these[@]}" --zero "${to#*:}" --resume "$(point "$from" 5)"
    close "$from-$to" one 5 8
done

# ---- in its own folder ---------------------------------------------------------------------
recipe_flags modern
cut_to() {      # cut_to NAME STEP...: a copy of the run `modern` that has these checkpoints and was killed
    local name="$1" step; shift
    cp -r "$work/modern" "$work/$name"
    rm -r "$work/$name/model.safetensors" "$work/$name"/checkpoints/*
    for step in "$@"; do cp -r "$(point modern "$step")" "$work/$name/checkpoints"; done
}
goes_on() {      # goes_on NAME STEP: --resume auto did so, from there
    has "$1" "$work/$1/log.txt" "resumed from .*step_00000$2: step $2, saved by 1 rank, commit "
    cmp -s <(lines modern log.txt) <(lines "$1" log.txt); check $? "$1: its log is that of the run that did not stop"
    equal "$1" modern 0 1
}
cut_to killed 2 5
mkdir "$work/killed/checkpoints/.step_000006.tmp"
cp "$(point modern 6)"/state* "$work/killed/checkpoints/.step_000006.tmp"
run_well killed 1 "${these[@]}" --resume auto --checkpoint-every 1 --keep 2 --keep-every 4
goes_on killed 5
cmp -s <(lines modern log.txt) <(lines killed log.1.txt); check $? "killed: the log of before is kept"
holds() { find "$work/$1/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' 2> /dev/null | sort | tr '\n' ' '; }      # holds RUN: its checkpoints
[ "$(holds killed)" = "step_000007 step_000008 " ]; check $? "killed: --keep 2, and what was half written is gone: $(holds killed)"
# A run that has ended ends again, with the same.
run_well killed 1 "${these[@]}" --resume auto --checkpoint-every 1
goes_on killed 8
run_well kept 1 "${these[@]}" --checkpoint-every 1 --keep 2 --keep-every 3
[ "$(holds kept)" = "step_000003 step_000006 step_000007 step_000008 " ]; check $? "--keep 2 --keep-every 3 keeps $(holds kept)"
run_well new 1 "${these[@]}" --resume auto
cmp -s <(lines modern log.txt) <(lines new log.txt); check $? "--resume auto where there is nothing is a new run"

# ---- checkpoints that will not do ----------------------------------------------------------
flip() {      # flip FILE OFFSET: a bit
    local byte; byte=$(od -An -tu1 -j "$2" -N1 "$1" | tr -d ' ')
    # shellcheck disable=SC2059    # an octal escape
    printf "\\$(printf %03o $((byte ^ 4)))" | dd of="$1" bs=1 seek="$2" conv=notrunc 2> /dev/null
}
seal() {      # seal FILE: makes a manifest's checksum right, so that what else it says is looked at
    local sum
    sed -i '$d' "$1"
    sum=$(gzip -c < "$1" | tail -c 8 | od -An -tx4 -N4 | tr -d ' ')
    echo "\"crc32\":\"$sum\"}" >> "$1"
}
spoil() {      # spoil HOW CHECKPOINT
    local manifest="$2/manifest.json" state="$2/state.rank0.safetensors"
    case $1 in
        bit) flip "$state" $(($(stat -c %s "$state") - 1000)) ;;
        weight) flip "$2/model.safetensors" $(($(stat -c %s "$2/model.safetensors") - 100)) ;;
        header) flip "$state" 60 ;;
        manifest) flip "$manifest" 200 ;;
        short) truncate -s -1 "$state" ;;
        half) rm "$state" ;;
        unfinished) rm "$manifest" ;;
        newer) sed -i 's/^"version":1,/"version":2,/' "$manifest"; seal "$manifest" ;;
        sealed) seal "$manifest" ;;
    esac
}
declare -A reason=([bit]='crc32|checksum' [weight]='crc32|checksum' [header]='state.rank0' [manifest]='crc32|checksum' [short]='bytes'
                   [half]='No such file' [unfinished]='No such file' [newer]='version 2')
kinds="bit weight header manifest short half unfinished newer"
[ -z "$short" ] || kinds="bit"
for kind in $kinds; do
    cut_to "spoiled-$kind" 3 6
    spoil "$kind" "$(point "spoiled-$kind" 6)"
    refused "spoiled-$kind" "step_000006.*(${reason[$kind]})" 1 "${these[@]}" --resume "$(point "spoiled-$kind" 6)"
    run_well "spoiled-$kind" 1 "${these[@]}" --resume auto --checkpoint-every 1
    has "spoiled-$kind" "$work/spoiled-$kind.err" "step_000006.*(${reason[$kind]})"
    goes_on "spoiled-$kind" 3
done
cut_to sealed 3 6; spoil sealed "$(point sealed 6)"
run_well sealed 1 "${these[@]}" --resume auto --checkpoint-every 1
goes_on sealed 6
cut_to none 3 6; spoil bit "$(point none 3)"; spoil short "$(point none 6)"
refused none 'none of' 1 "${these[@]}" --resume auto
has none "$work/none.err" 'step_000003'
has none "$work/none.err" 'step_000006'
refused missing 'step_000009' 1 "${these[@]}" --resume "$(point modern 9)"

# ---- flags and data that differ ------------------------------------------------------------
refused maths '^ +--muon-lr: checkpoint 0.00036 / given 0.001$' 1 "${these[@]}" --resume "$(point modern 3)" --muon-lr 0.001 --seed 7 \
    --val-every 2
has maths "$work/maths.err" '^ +--seed: checkpoint 1 / given 7$'
! grep -q 'val-every' "$work/maths.err"; check $? "maths: names no flag that may differ"
refused model '^ +--layers: checkpoint 2 / given 3$' 1 "${these[@]}" --resume "$(point modern 3)" --layers 3
refused recipe 'checkpoint .* / given ' 1 --recipe untied --resume "$(point modern 3)"
run_well taken 1 "${these[@]}" --resume "$(point modern 3)" --micro-batch 4 --val-every 2
has taken "$work/taken/log.txt" '^ +--micro-batch: checkpoint 2 / given 4$'
has taken "$work/taken/log.txt" '^ +--val-every: checkpoint 3 / given 2$'
"$tools/text_to_shards" --out "$work/other" llmc/*.h > /dev/null
refused data 'other shards' 1 "${these[@]}" --resume "$(point modern 3)" --train "$work/other_train_*.bin"
refused later 'later checkpoints' 1 "${these[@]}" --resume "$(point modern 3)" --out "$work/modern"
# A folder that holds a run is written to by no other.
contents() { find "$1" -type f -not -name lock -exec cksum {} + | sort; }      # a refused run leaves a lock that nobody holds
before=$(contents "$work/modern")
refused again 'holds a run' 1 "${these[@]}" --out "$work/modern"
has again "$work/again.err" '--resume auto continues it; or give another --out'
[ "$(contents "$work/modern")" = "$before" ]; check $? "again: nothing was written"

# ---- what is remembered of losses ----------------------------------------------------------
# z-scores begin after 128 steps.
run_well window 1 --recipe modern --batch-tokens 32 --micro-batch 1 --layers 1 --heads 1 --steps 134 --val-every 200 --checkpoint-every 131
run_well window-131 1 --recipe modern --batch-tokens 32 --micro-batch 1 --layers 1 --heads 1 --steps 134 --val-every 200 \
    --checkpoint-every 131 --resume "$(point window 131)"
cmp -s <(events window 131) <(events window-131 131); check $? "window: losses, norms and their z-scores"
events window 131 | grep -qE '"loss_z":-?[0-9].*"grad_norm_z":-?[0-9]'; check $? "window: there are z-scores"

# ---- signals -------------------------------------------------------------------------------
wait_for_line() { for _ in $(seq 300); do grep -q "$2" "$1" 2> /dev/null && return; sleep 0.1; done; }      # FILE REGEX
# Each rank under a shell that writes down how it ended.
cat > "$work/rank" << 'END'
#!/usr/bin/env bash
folder=$1; shift
"$@" &
echo $! > "$folder/pid${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"
trap '' INT TERM
while true; do wait $!; status=$?; kill -0 $! 2> /dev/null || break; done
echo $status > "$folder/status${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"
# mpirun kills the others a second after the first has ended with another status than 0: all are to be heard.
for _ in $(seq 100); do [ "$(find "$folder" -name 'status*' | wc -l)" -eq 3 ] && break; sleep 0.1; done
exit $status
END
chmod +x "$work/rank"
signals="INT TERM USR1"
[ -z "$short" ] || signals="TERM"
for signal in $signals; do
    name=stopped-$signal
    mkdir "$work/$name.ranks"
    flags "$name" "${these[@]}" --steps 100000 --checkpoint-every 0 --batch-tokens 384 --val-every 100000
    timeout -k 10 60 mpirun -np 3 env --default-signal=INT "$work/rank" "$work/$name.ranks" "$program" "${line[@]}" \
        > "$work/$name.txt" 2> "$work/$name.err" &
    wait_for_line "$work/$name/log.txt" '^step:4/'
    kill "-$signal" "$(cat "$work/$name.ranks/pid1")"
    wait $!; status=$?
    [ $status -eq 75 ]; check $? "SIG$signal to rank 1: mpirun ends with 75 (got $status)"
    [ "$(cat "$work/$name.ranks"/status* | tr '\n' ' ')" = "75 75 75 " ]
    check $? "SIG$signal: all ranks end with 75: $(cat "$work/$name.ranks"/status* | tr '\n' ' ')"
    step=$(sed -nE 's/^step:([0-9]+)\/.* train_loss:.*/\1/p' "$work/$name/log.txt" | tail -1)
    for r in 1 2; do
        has "SIG$signal: rank $r stops after step $step, too" <(grep -o 'step:[0-9]*/.* train_loss' "$work/$name/log.rank$r.txt" | tail -1) \
            "^step:$step/"
    done
    [ "$(holds "$name")" = "$(printf 'step_%06d ' "$step")" ]; check $? "SIG$signal: a checkpoint of the last step, $step: $(holds "$name")"
    ! [ -e "$work/$name/model.safetensors" ]; check $? "SIG$signal: no weights of a run that has not ended"
    has "SIG$signal" "$work/$name/log.jsonl" '"event":"end","status":75'
    ! grep -q '^train_gpt2: ' "$work/$name.err"; check $? "SIG$signal: no complaint: $(head -1 "$work/$name.err")"
done
# mpirun passes SIGUSR1 on; one that goes on is stopped again.
run_three() { timeout -k 10 60 mpirun -np 3 "$program" "${line[@]}" > "$work/$name.txt" 2> "$work/$name.err"; }
line+=(--resume auto)
run_three &
wait_for_line "$work/$name/log.txt" "^step:$((step + 3))/"
kill -USR1 "$(pgrep -P "$(pgrep -P $!)" mpirun || pgrep -P $! mpirun)"
wait $!; status=$?
[ $status -eq 75 ]; check $? "SIGUSR1 to mpirun: it ends with 75 (got $status)"
[ "$(sed -nE 's/^step:([0-9]+)\/.* train_loss:.*/\1/p' "$work/$name/log.txt" | sort -n | uniq -d | wc -l)" -eq 0 ]
check $? "SIGUSR1 to mpirun: each step stands in the log once"
# A step of some seconds: the second signal comes before its end.
flags twice-int "${these[@]}" --steps 100000 --batch-tokens 262144 --checkpoint-every 1 --val-every 100000
env --default-signal=INT "$program" "${line[@]}" > "$work/twice-int.txt" 2>&1 &
wait_for_line "$work/twice-int/log.txt" '^step:0/'
sleep 0.3
kill -INT $!; sleep 0.1; kill -INT $!
wait $!; status=$?
[ $status -eq 130 ]; check $? "a second SIGINT ends the run with 130 (got $status)"
[ -z "$(holds twice-int)" ]; check $? "and leaves no checkpoint of a step that was not made: $(holds twice-int)"

# ---- what a checkpoint costs ---------------------------------------------------------------
costs=$(sed -nE 's/.*"event":"checkpoint","step":[0-9]+,"bytes":([0-9]+),"pause_ms":([0-9.e+-]+),"write_ms":([0-9.e+-]+).*/\1 \2 \3/p' \
        "$work/normuon/log.jsonl" | awk '{ n++; bytes += $1; pause += $2; written += $3 }
        END { if (n) printf "%.1f MB, training waits %.2f ms, written in %.0f ms", bytes / n / 1e6, pause / n, written / n; exit n != 8 }')
check $? "normuon: eight checkpoints in log.jsonl, with bytes and times"
echo "note  a checkpoint of a small normuon: $costs"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
