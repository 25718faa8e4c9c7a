#!/usr/bin/env bash
# test/ranks.sh PROGRAM [CHECK_TRACE]: the trainer as several ranks under mpirun, on shards made from this repository's own text.
#   1, 2, 3, 4 and 8 ranks, --zero 0 and 1: the losses of one rank, equal bits when repeated and in other orders of execution
#   bytes on the wire by the formula, who writes which log, --trace
#   ranks that do not belong together, data that is not there, too few devices, a full /dev/shm: one message, and all end
# Tests of their own have the kill of a rank (test/faults.sh), signals and resuming (test/resume.sh).
set -u
program=$(realpath "$1")
tools=$(dirname "$program")
check_trace=$(realpath "${2:-$tools/check_trace}")
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
# What Open MPI wants to be told on a machine with fewer cores than ranks, and where root runs the tests.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_abort_print_stack=0 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOST_THREADS=1

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
skip() { echo "skip  $1"; skipped=$((skipped + 1)); }
has() { grep -qE -- "$3" "$2"; check $? "$1: $3"; }      # has NAME FILE REGEX
same() { cmp -s "$2" "$3"; check $? "$1"; }
without_times() { grep -E '^(step|RESULT)' "$1" | sed -E 's/(train_time|step_avg):[0-9.]+ms//g'; }
tensor_bytes() {      # a safetensors file without its header, which names the output directory
    local header; header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
    tail -c +$((9 + header)) "$1"
}
weights() { tensor_bytes "$work/$1/model.safetensors"; }
same_weights() { [ -s "$work/$2/model.safetensors" ] && cmp -s <(weights "$2") <(weights "$3"); check $? "$1"; }      # NAME RUN RUN

"$tools/text_to_shards" --out "$work/text" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
# 24 sequences in a step: so many divide by 1, 2, 3, 4 and 8 ranks.
base=(--layers 2 --heads 2 --channels 64 --vocab 320 --seq-len 32 --micro-batch 1 --batch-tokens 768 --val-tokens 500 --val-every 10
      --steps 20 --epochs 0 --recipe modern --train "$work/text_train_*.bin" --val "$work/text_val_*.bin")
flags() {      # flags NAME FLAGS...: those of a small run into $work/NAME; FLAGS replace those of base
    local name="$1" i; shift
    line=()
    for ((i = 0; i < ${#base[@]}; i += 2)); do
        [[ " $* " == *" ${base[i]} "* ]] || line+=("${base[i]}" "${base[i + 1]}")
    done
    [[ " $* " == *" --out "* ]] || line+=(--out "$work/$name")
    line+=("$@")
}
# No run here may take a minute: one that hangs ends with 124.
run() {      # run NAME RANKS FLAGS...: what it prints into $work/NAME.txt, what it complains of into $work/NAME.err
    local name="$1" ranks="$2"; shift 2
    flags "$name" "$@"
    timeout -k 10 60 mpirun -np "$ranks" "$program" "${line[@]}" > "$work/$name.txt" 2> "$work/$name.err"
}
run_well() { run "$@"; local status=$?; check $status "$1: ends well (exit $status): $(head -1 "$work/$1.err")"; }
losses() {      # losses NAME EVENT: lines "step loss", to all digits
    sed -nE "s/.*\"event\":\"$2\",\"step\":([0-9]+).*\"$2_loss\":([0-9.e+-]+).*/\1 \2/p" "$work/$1/log.jsonl"
}
# fp32: the same terms are added in another order; 1e-5 is the promise. bf16: gradients are rounded once to be sent and at every
# hop, off by (N+1) 2^-9 of themselves, so to first order the descent so far is off by that part; 2e-4 for the loss's own rounding.
close() {      # close NAME RANKS EVENT COUNT: as many losses as that, near those of zero1-1
    local words
    words=$(paste -d' ' <(losses zero1-1 "$3") <(losses "$1" "$3") | awk -v ranks="$2" -v precision="$precision" -v count="$4" '
        NR == 1 { first = lowest = $2 }
        { if ($2 < lowest) lowest = $2
          allowed = precision == "bf16" ? (ranks + 1) / 512 * (first - lowest) + 2e-4 : 1e-5 * $2
          off = $4 - $2; if (off < 0) off = -off
          if (off / allowed > worst) worst = off / allowed
          if (NF != 4 || $1 != $3 || !(off <= allowed)) bad++ }
        END { printf "%d %s losses, the farthest at %.3f of what is allowed, %d beyond", NR, "'"$3"'", worst, bad
              exit !(NR == count && bad == 0) }')
    check $? "$1: near those of one rank: $words"
    [ -n "${VERBOSE:-}" ] && echo "note  $1: $words"
}

rank_pid() {      # rank_pid NAME RANK: of the run into $work/NAME
    local pid
    for pid in $(pgrep -f -- "--out $work/$1( |\$)"); do
        tr '\0' '\n' < "/proc/$pid/environ" 2> /dev/null | grep -qxE "(OMPI_COMM_WORLD_RANK|PMI_RANK)=$2" && echo "$pid"
    done
}
wait_for_line() { for _ in $(seq 300); do grep -q "$2" "$1" 2> /dev/null && return; sleep 0.1; done; }      # FILE REGEX

# ---- any number of ranks -------------------------------------------------------------------
run_well zero1-1 1
precision=$(sed -nE 's/^parameters .*, (fp32|bf16)$/\1/p' "$work/zero1-1.txt")
[ -n "$precision" ]; check $? "prints its precision"
for zero in 1 0; do
    for ranks in 2 3 4 8; do
        name=zero$zero-$ranks
        run_well $name $ranks --zero $zero
        close $name $ranks train 20
        close $name $ranks val 3
    done
done
run_well again 8
same_weights "8 ranks twice: weights" zero1-8 again
same "8 ranks twice: log" <(without_times "$work/zero1-8/log.txt") <(without_times "$work/again/log.txt")
! cmp -s <(weights zero1-1) <(weights zero1-8)
check $? "8 ranks add in another order than one"

# ---- bytes on the wire ---------------------------------------------------------------------
# The formula, from the printed number of parameters; at these sizes every bucket and table divides by the ranks.
wire() {      # wire NAME: reduced, gathered, sums
    sed -nE 's/^  on the wire per step and rank: ([0-9]+) bytes to reduce .*, ([0-9]+) to gather .*, ([0-9]+) for sums.*/\1 \2 \3/p' \
        "$work/$1.txt"
}
size=4; [ "$precision" = bf16 ] && size=2
for ranks in 2 4 8; do
    for zero in 1 0; do
        flags dry-$ranks --layers 8 --zero $zero --ranks $ranks
        "$program" "${line[@]}" --dry-run > "$work/dry-$ranks.txt" 2>&1; check $? "--dry-run --ranks $ranks without mpirun"
        parameters=$(sed -nE 's/^parameters ([0-9]+),.*/\1/p' "$work/dry-$ranks.txt")
        part=$(((ranks - 1) * ${parameters:-0} / ranks * size))
        micro=$((768 / 32 / ranks))
        sums=$((2 * (ranks - 1) * ((8 + micro + ranks - 1) / ranks) * 4))
        if [ $zero -eq 1 ]; then want="$part $part $sums"; else want="$((2 * part)) 0 $sums"; fi
        [ "$(wire dry-$ranks)" = "$want" ] && [ $part -gt 0 ]
        check $? "--ranks $ranks --zero $zero: bytes to reduce, to gather, for sums are $want (found $(wire dry-$ranks))"
    done
done
for zero in 1 0; do
    flags dry-3 --zero $zero --ranks 3
    "$program" "${line[@]}" --dry-run > "$work/dry-3.txt" 2>&1
    [ -n "$(wire dry-3)" ] && [ "$(wire dry-3)" = "$(wire zero$zero-3)" ]
    check $? "--zero $zero: --dry-run and a run of 3 ranks say the same"
done

# ---- who writes what -----------------------------------------------------------------------
for ranks in 2 8; do
    want="checkpoints log.jsonl $(for ((r = 1; r < ranks; r++)); do echo log.rank$r.txt; done | tr '\n' ' ')log.txt model.safetensors "
    found=$(ls "$work/zero1-$ranks" | tr '\n' ' ')
    [ "$found" = "$want" ]; check $? "files of $ranks ranks: $found"
    for ((r = 1; r < ranks; r++)); do
        same "log of rank $r of $ranks" <(without_times "$work/zero1-$ranks/log.txt" | grep train_loss) \
             <(without_times "$work/zero1-$ranks/log.rank$r.txt" | grep train_loss)
    done
done
lines=$(tr '\r' '\n' < "$work/zero1-3.txt" | grep -v '^$' | sort | uniq -d)
[ -z "$lines" ]; check $? "stdout has each line once: $lines"
for words in 'RESULT ' 'memory: ' 'parameters ' 'train: ' 'ranks 3, ' '  rank 0 owns ' '  rank 2 owns ' 'step:0/20 val_loss:' \
             'step:20/20 train_loss:'; do
    [ "$(tr '\r' '\n' < "$work/zero1-3.txt" | grep -c "^$words")" -eq 1 ]; check $? "stdout has one line '$words'"
done
! grep -q . "$work/zero1-3.err"; check $? "and stderr none: $(head -1 "$work/zero1-3.err")"

# ---- the order of a step -------------------------------------------------------------------
traced() {      # traced NAME RANKS ZERO
    local files=() r
    for ((r = 0; r < $2; r++)); do files+=("$work/$1.rank$r.json"); done
    # A step more than the trace has: after the last one the weights are saved, and that waits for all of them.
    run_well "$1" "$2" --zero "$3" --layers 8 --steps 4 --trace-steps 3 --trace "$work/$1.json"
    "$check_trace" --zero "$3" "${files[@]}" > "$work/$1.check" 2>&1
    check $? "$1: check_trace: $(grep -m1 FAIL "$work/$1.check" || tail -1 "$work/$1.check")"
}
traced trace-2 2 1
traced trace-4 4 1
traced trace-zero0 2 0
HOST_STREAMS=lazy traced trace-lazy-2 2 1
HOST_STREAMS=lazy traced trace-lazy-4 4 1
# A step long enough that the thread reads the next batch meanwhile on any machine: the program never waits for data.
run_well trace-data 1 --micro-batch 24 --layers 4 --steps 14 --trace-steps 8 --trace "$work/trace-data.json"
"$check_trace" --data "$work/trace-data.json" > "$work/trace-data.check" 2>&1
check $? "trace-data: a step waits for data: $(grep -m1 FAIL "$work/trace-data.check" || tail -1 "$work/trace-data.check")"

# ---- other orders of execution -------------------------------------------------------------
# Work of a stream waits until something synchronises, and blocks run in another order: a missing event is a wrong number.
for ranks in 2 3; do
    seed=$((12345 / ranks))
    HOST_STREAMS=lazy HOST_SCHED=$seed run_well lazy-$ranks $ranks
    same_weights "$ranks ranks, lazy streams, order $seed: weights" zero1-$ranks lazy-$ranks
done

# ---- what is refused -----------------------------------------------------------------------
# mpirun takes two seconds to end where a rank ends with an error: these runs wait for that at the same time.
later=() words=()
refused() {      # refused NAME REGEX COMMAND...: starts it; judge then says whether it is refused with these words
    later+=("$1") words+=("$2")
    ("${@:3}"; echo $? > "$work/$1.status") &
}
judge() {      # each run has ended with one message, which says what it should, and nothing was trained
    local i name count status
    wait
    for i in "${!later[@]}"; do
        name=${later[i]}
        count=$(grep -c '^train_gpt2: ' "$work/$name.err") status=$(cat "$work/$name.status")
        [ "$status" -eq 1 ]; check $? "refused $name: exit 1 (got $status)"
        [ "$count" -eq 1 ]; check $? "refused $name: one message (found $count): $(grep -m2 '^train_gpt2: ' "$work/$name.err" | tr '\n' ' ')"
        grep -A3 '^train_gpt2: ' "$work/$name.err" | grep -qE -- "${words[i]}"
        check $? "refused $name: says ${words[i]}: $(grep -m1 '^train_gpt2: ' "$work/$name.err")"
        ! [ -e "$work/$name/model.safetensors" ]; check $? "refused $name: nothing is saved"
    done
    later=() words=()
}
pair() {      # pair NAME FLAG VALUE VALUE: two ranks of other flags
    flags "$1" --steps 3
    timeout -k 10 60 mpirun -np 1 "$program" "${line[@]}" "$2" "$3" : -np 1 "$program" "${line[@]}" "$2" "$4" \
        > "$work/$1.txt" 2> "$work/$1.err"
}
cp "$program" "$work/other_program"
printf '\0' >> "$work/other_program"
programs() {      # programs NAME: rank 2 is another one
    flags "$1" --steps 3 --recipe "$PWD/scripts/recipes/modern.cfg"
    timeout -k 10 60 mpirun -np 2 "$program" "${line[@]}" : -np 1 "$work/other_program" "${line[@]}" > "$work/$1.txt" 2> "$work/$1.err"
}
refused seeds 'rank 1 .*seed is 2, rank 0 has 1' pair seeds --seed 1 2
refused rates 'rank 1 .*muon-lr is 0.02, rank 0 has 0.01' pair rates --muon-lr 0.01 0.02
refused programs 'rank 2 .*program is [0-9a-f]{16}, rank 0 has [0-9a-f]{16}' programs programs
refused count '--ranks 4, but 2 take part' run count 2 --ranks 4
refused flag 'no flag --stepz' run flag 4 --stepz 5
refused batch 'batch-tokens 768 is not a multiple of 5 ranks' run batch 5
HOST_DEVICES=2 refused devices 'ranks 0 and 2 are both on GPU' run devices 3
refused out 'out .*text_train_000001.bin' run out 3 --out "$work/text_train_000001.bin/run"
refused sampling 'samples on one rank' run sampling 2 --load "$work/zero1-1/model.safetensors" --train '' --sample-tokens 5
judge

# Each rank looks for its data where it stands, as where a disk belongs to a node.
cat > "$work/in_own_folder" << END
#!/usr/bin/env bash
cd "\$1.\${OMPI_COMM_WORLD_RANK:-\$PMI_RANK}" && shift && exec \$BEFORE "\$@"
END
chmod +x "$work/in_own_folder"
folders() {      # folders NAME: of three ranks, NAME.0 .. NAME.2
    local r
    for r in 0 1 2; do
        mkdir "$work/$1.$r"
        cp "$work/text_train_000001.bin" "$work/$1.$r/train1.bin"
        cp "$work/text_val_000000.bin" "$work/$1.$r/val0.bin"
    done
}
apart() {      # apart NAME FLAGS...: three ranks, each in its folder
    flags "$@" --recipe "$PWD/scripts/recipes/modern.cfg" --train 'train*.bin' --val 'val*.bin'
    timeout -k 10 60 mpirun -np 3 "$work/in_own_folder" "$work/$1" "$program" "${line[@]}" > "$work/$1.txt" 2> "$work/$1.err"
}
export BEFORE=''
folders same
apart same --steps 3 --out run --checkpoint-every 0; check $? "three ranks with data of their own that is the same"
[ "$(ls -x "$work/same.0/run")" = "log.jsonl  log.txt  model.safetensors" ]; check $? "rank 0 writes logs and weights"
[ "$(ls "$work/same.1/run")" = log.rank1.txt ]; check $? "rank 1 writes its log and nothing else: $(ls -x "$work/same.1/run")"
# Checkpoints want one disk for all; training goes on without.
folders disks
apart disks --steps 3 --out run --checkpoint-every 2; check $? "three ranks whose disks are their own"
has disks "$work/disks.err" '^train_gpt2: no checkpoint of step 2: rank 0: .*state.rank[12].safetensors'
[ -z "$(find "$work"/disks.? -name 'step_*')" ]; check $? "disks: nothing has a checkpoint's name"
folders shards; cp "$work/shards.2/train1.bin" "$work/shards.2/train2.bin"
refused shards 'rank 2 .*number of training shards is 2, rank 0 has 1' apart shards --steps 3
folders names; mv "$work/names.1/train1.bin" "$work/names.1/train3.bin"
refused names 'rank 1 .*names and sizes of the training shards' apart names --steps 3
folders sizes; "$tools/text_to_shards" --out "$work/shorter" llmc/*.cuh > /dev/null
cp "$work/shorter_train_000001.bin" "$work/sizes.1/train1.bin"
refused sizes 'rank 1 .*number of training tokens is [0-9]+, rank 0 has [0-9]+' apart sizes --steps 3
folders no-data; rm "$work/no-data.1/train1.bin"
refused no-data "rank 1: no file matches 'train" apart no-data --steps 3
folders no-file; rm "$work/no-file.1/train1.bin"; mkdir "$work/no-file.1/train1.bin"
refused no-file 'rank 1: train1.bin: not a file' apart no-file --steps 3
folders unreadable; chmod 000 "$work/unreadable.1/train1.bin"
# Root may read everything, unless it lays that right down.
before=''; [ "$(id -u)" -eq 0 ] && before='setpriv --bounding-set=-dac_override,-dac_read_search'
if $before true 2> /dev/null && ! $before cat "$work/unreadable.1/train1.bin" > /dev/null 2>&1; then
    BEFORE=$before refused unreadable 'rank 1: train1.bin: cannot be opened: Permission denied' apart unreadable --steps 3
else
    skip "a file that one rank may not read: setpriv does not take root's rights away here"
fi
# And one whose file is cut while it trains: it alone sees that, and all end.
folders cut
refused cut 'rank 1: train1.bin: ends at byte' apart cut --steps 100000 --val-every 100000
wait_for_line "$work/cut/log.rank1.txt" '^step:2/'
: > "$work/cut.1/train1.bin"
judge

# ---- /dev/shm ------------------------------------------------------------------------------
if unshare -m mount -t tmpfs -o size=4m tmpfs /dev/shm 2> /dev/null; then
    full_shm() {
        flags shm --steps 3
        unshare -m bash -c 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec timeout -k 10 60 mpirun -np 2 "$@"' shm "$program" "${line[@]}" \
            > "$work/shm.txt" 2> "$work/shm.err"
    }
    refused shm '/dev/shm has 4.0 MiB free, but 2 ranks' full_shm
    judge
else
    skip "a full /dev/shm: unshare -m is not permitted here"
fi

# ---- one process ---------------------------------------------------------------------------
flags alone --steps 100000 --val-every 100000
env -i HOST_THREADS=1 "$program" "${line[@]}" > "$work/alone.txt" 2>&1 &
wait_for_line "$work/alone/log.txt" '^step:2/'
sockets=$(find /proc/$!/fd -lname 'socket:*' | wc -l) parts=$(grep -c 'mca_' /proc/$!/maps)
kill -INT $!
wait $!; status=$?
[ $status -eq 75 ]; check $? "one process runs without an environment (exit $status)"
[ "$sockets" -eq 0 ]; check $? "one process opens no socket ($sockets)"
[ "$parts" -eq 0 ]; check $? "one process does not start MPI ($parts of its parts are loaded)"
run three 3 --steps 100000 --val-every 100000 &
wait_for_line "$work/three/log.txt" '^step:2/'
pid=$(rank_pid three 0)
sockets=$(find "/proc/$pid/fd" -lname 'socket:*' | wc -l) parts=$(grep -c 'mca_' "/proc/$pid/maps")
kill -INT "$pid"
wait $!
[ "$sockets" -gt 0 ] && [ "$parts" -gt 0 ]; check $? "three processes do, so that would be seen ($sockets, $parts)"

if [ -x "$tools-alone/train_gpt2_cpu" ]; then
    flags alone-2 --steps 3
    timeout -k 10 60 mpirun -np 2 "$tools-alone/train_gpt2_cpu" "${line[@]}" > "$work/alone-2.txt" 2> "$work/alone-2.err"
    status=$?
    [ $status -eq 1 ]; check $? "built with NCCL=0, two ranks: exit 1 (got $status)"
    has "built with NCCL=0" "$work/alone-2.err" 'mpirun started more than one rank, but this program was built with NCCL=0'
    ! [ -e "$work/alone-2/log.txt" ]; check $? "built with NCCL=0: no run"
    "$tools-alone/train_gpt2_cpu" "${line[@]}" > "$work/alone-1.txt" 2>&1; check $? "built with NCCL=0, one process"
else
    skip "a program without NCCL: make NCCL=0 has not made $(basename "$tools")-alone/train_gpt2_cpu"
fi

if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
