#!/usr/bin/env bash
# The GPT-2 speedrun on one node of eight H100: checks what it needs, trains by a recipe, and prints what the
# published record's log shows beside what ours shows. NOT YET RUN ON A GPU; --cpu has been.
#
#   scripts/speedrun_8xh100.sh [modern|untied|unet|sub3_20|sub3|normuon] [--ranks N] [--data DIR] [--cpu] [--check] [-- FLAG VALUE ...]
#
#   modern       records 5 and 6 (the default); untied: record 8; unet: 11; sub3_20: 20; sub3: 21; normuon: 45
#   --ranks N    N GPUs, not 8: 1, 2 or 4. The same mathematics, a batch then takes 8/N micro-steps of the same size
#   --data DIR   the folder of the token shards; data/fineweb10B if not said
#   --cpu        a rehearsal without a GPU: train_gpt2_cpu on 2 ranks, 2 steps of 512 tokens, any shards in DIR
#   --check      checks, prints the command, starts nothing
#   --           what follows goes to the trainer and wins over what stands here: -- --micro-batch 32
#
# Into runs/speedrun-RECIPE, or -2, -3 .. where there are runs already. Ctrl-C ends the run with a checkpoint and status 75;
# `-- --resume auto` then goes on in the last of these folders.
set -eu
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; }
stop() {      # stop LINE...: what is wrong, then what to type
    printf '%s\n' "speedrun: $1" >&2
    shift
    [ $# -eq 0 ] || printf '          %s\n' "$@" >&2
    exit 1
}
need_value() { [ $# -ge 2 ] || stop "$1 wants a value" "$0 --help"; }

recipe=modern ranks="" data=data/fineweb10B cpu="" check=""
while [ $# -gt 0 ]; do
    case "$1" in
        modern | untied | unet | sub3_20 | sub3 | normuon) recipe=$1 ;;
        --ranks) need_value "$@"; ranks=$2; shift ;;
        --data) need_value "$@"; data=$(realpath -m "$2"); shift ;;
        --cpu) cpu=yes ;;
        --check) check=yes ;;
        --help) usage; exit 0 ;;
        --) shift; break ;;
        *) stop "no argument $1; flags of the trainer stand behind --" "$0 --help" ;;
    esac
    shift
done
cd "$(dirname "$0")/.."
. scripts/run_child.sh
ranks=${ranks:-$([ -n "$cpu" ] && echo 2 || echo 8)}
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || stop "--ranks $ranks: must be a number of at least 1"

# ---- what the records' logs show -----------------------------------------------------------
# From the logs published with modded-nanogpt, records/track_1_short: 2024-10-14_ModernArch/dabaaddd...,
# 2024-10-17_DistributedMuon/22d24867..., 2024-11-03_UntieEmbed, 2024-11-10_UNetDoubleLr/c87bb826...,
# 2025-01-16_Sub3Min, 2025-01-26_BatchSize (timed again on 2025-02-01) and 2025-11-18_RefineSkip; eight H100 80GB SXM,
# PyTorch 2.4 to 2.10 (record 8: its time is the table's 10.8 minutes). Validation loss over the first 10,485,760 tokens of the validation shard.
record_curve() {
    case $recipe in
        modern) printf '%s\n' "step record-5 record-6" "0 16.0058 16.0098" "125 4.9493 4.9669" "250 4.3294 4.3420" \
            "500 3.9188 3.9223" "1000 3.6815 3.6852" "1500 3.5783 3.5799" "2000 3.5143 3.5166" "2500 3.4737 3.4755" \
            "3000 3.4414 3.4433" "3500 3.4140 3.4145" "4000 3.3709 3.3718" "4500 3.3195 3.3205" "5000 3.2776 3.2783" \
            "5100 3.2741 3.2747" "seconds 910.5 783.1" ;;
        untied) printf '%s\n' "step record-8" "4578 3.2762" "seconds 648" ;;
        unet) printf '%s\n' "step record-11" "0 10.8258" "125 4.5262" "250 4.0672" "500 3.8112" "1000 3.5918" \
            "1500 3.4969" "2000 3.4357" "2500 3.3475" "3000 3.2753" "seconds 433.6" ;;
        sub3_20) printf '%s\n' "step record-20" "0 10.8258" "125 4.4043" "250 3.9863" "500 3.6643" "750 3.5286" "1000 3.4151" \
            "1250 3.3164" "1393 3.2785" "seconds 179.5" ;;
        sub3) printf '%s\n' "step record-21" "0 10.8258" "125 4.6539" "250 4.1116" "500 3.7528" "750 3.6030" "1000 3.5136" \
            "1250 3.4255" "1500 3.3425" "1750 3.2818" "1770 3.2788" "seconds 179.8" ;;
        normuon) printf '%s\n' "step record-45" "0 10.8258" "250 4.0964" "500 3.8205" "750 3.6674" "1000 3.5911" "1250 3.5196" \
            "1500 3.4380" "1750 3.3737" "2000 3.3195" "2225 3.2777" "seconds 134.8" ;;
    esac
}
columns() { awk '{ printf "   "; for (i = 1; i <= NF; i++) printf " %-10s", $i; print "" }'; }
case $recipe in      # steps, and shards of 100,000,000 tokens that hold them
    modern) steps=5100 shards=27 ;;
    untied) steps=4578 shards=25 ;;
    unet) steps=3000 shards=16 ;;
    sub3_20) steps=1393 shards=8 ;;
    sub3) steps=1770 shards=7 ;;
    normuon) steps=2225 shards=9 ;;       # cuts documents: what it throws away is part of them
esac

# ---- the command ---------------------------------------------------------------------------
program=./train_gpt2
base=runs/speedrun-$recipe
flags=(
    --recipe "$recipe"             # the model, its optimizer and schedule, batch, order of the data, validation
    --train "$data/*_train_*.bin"
    --val "$data/*_val_*.bin"
    --ranks "$ranks"               # a process that starts alone is an error, not another run
    --zero 1                       # optimizer state and fp32 master of a matrix on one rank
    --grad-reduce weights          # gradients travel in bf16, as weights do
    --seed 1                       # of the initial parameters; the spread over seeds is the spread of the result
    --checkpoint-every 0           # the record wrote none; a signal still makes one
)
if [ -n "$cpu" ]; then
    program=./train_gpt2_cpu
    base=runs/rehearsal-$recipe
    flags+=(--steps 2 --seq-len 64 --batch-tokens 512 --micro-batch 1 --val-every 2 --val-tokens 1024)
    case $recipe in sub3* | normuon) flags+=(--val-seq-len 64 --window-block 16 --extension-steps 0 --batching stream) ;; esac
    export HOST_THREADS="${HOST_THREADS:-1}"                # a rank is a core
    export OMPI_MCA_rmaps_base_oversubscribe=1              # or shares one
fi
flags+=("$@")
# The trainer refuses a flag that is given twice: of two, the later stays.
declare -A value=()
order=()
for ((i = 0; i < ${#flags[@]}; i += 2)); do
    name=${flags[i]}
    [ $((i + 1)) -lt ${#flags[@]} ] || stop "$name: flags behind -- come in pairs, FLAG VALUE"
    [ -n "${value[$name]+there}" ] || order+=("$name")
    value[$name]=${flags[i + 1]}
done
resume=${value[--resume]:-}
out=${value[--out]:-$(run_folder "$base" "$resume")}
[ -n "${value[--out]+there}" ] || { value[--out]=$out; order+=(--out); }
command=(mpirun -np "$ranks" --bind-to none "$program")      # bound to one core, a rank's threads would take turns
for name in "${order[@]}"; do command+=("$name" "${value[$name]}"); done
# Open MPI asks root twice; rented machines log in as root.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                    # NCCL's own words when something is wrong

# ---- checks --------------------------------------------------------------------------------
count() { local n=0 file; for file in "$@"; do [ -e "$file" ] && n=$((n + 1)); done; echo $n; }
free_mb() { df -Pm "$1" | awk 'NR == 2 { print $4 }'; }

if [ -z "$cpu" ]; then
    command -v nvidia-smi > /dev/null || stop "nvidia-smi is not here: no NVIDIA driver on this machine" \
        "without a GPU: $0 $recipe --cpu --data DIR"
    gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>&1) || stop "nvidia-smi fails: $(head -1 <<< "$gpus")"
    found=$(grep -c . <<< "$gpus" || true)
    [ "$found" -ge "$ranks" ] || stop "$ranks GPUs wanted, found $found" "$0 $recipe --ranks $found"
    grep -q H100 <<< "$gpus" || echo "note  the records ran on H100, here is $(head -1 <<< "$gpus")"
    busy=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader | grep -c . || true)
    [ "$busy" -eq 0 ] || echo "note  $busy other processes use the GPUs: times will say little"
fi
command -v mpirun > /dev/null || stop "mpirun is not here" "apt install openmpi-bin libopenmpi-dev"
[ -x $program ] || stop "$program is not built" "make ${program#./}"
libraries=$(ldd $program)
missing=$(awk '/not found/ { print $1 }' <<< "$libraries" | tr '\n' ' ')
[ -z "$missing" ] || stop "$program does not find $missing" "LD_LIBRARY_PATH=/usr/local/cuda/lib64 $0 ..."
grep -q libmpi <<< "$libraries" || stop "$program was built with NCCL=0, for one rank" "make ${program#./}"
train=$(count "$data"/*_train_*.bin) val=$(count "$data"/*_val_*.bin)
if [ -z "$cpu" ] && [ "${value[--steps]:-$steps}" -ge "$steps" ]; then wanted=$shards; else wanted=1; fi
if [ "$train" -lt "$wanted" ] || [ "$val" -lt 1 ]; then
    stop "$data has $train training and $val validation shards; $recipe reads $wanted and 1 (200 MB each). FineWeb in GPT-2 tokens:" \
        "scripts/download_fineweb.sh $wanted $data" \
        "or another folder: --data DIR; or a shorter run: -- --steps 100"
fi
mkdir -p "$out"
[ -n "$cpu" ] || [ "$(free_mb "$out")" -ge 6000 ] ||
    stop "$out has $(free_mb "$out") MB free, logs, weights and a checkpoint want 6000" "df -h $out"
[ -n "$cpu" ] || [ "$(free_mb /dev/shm)" -ge 1000 ] ||
    stop "/dev/shm has $(free_mb /dev/shm) MB free, MPI and NCCL want 1000" "in a container: docker run --shm-size=2g ..."

# ---- the run -------------------------------------------------------------------------------
printf '%q ' "${command[@]}"; echo
if [ -z "$cpu" ]; then
    echo "not yet run on a GPU. What the published logs show:"
    record_curve | columns
fi
[ -z "$check" ] || exit 0
run_child "${command[@]}"
[ $status -ne 75 ] || { echo "speedrun: stopped with a checkpoint; it goes on with -- --resume auto --out $out" >&2; exit 75; }
[ $status -eq 0 ] || { echo "speedrun: exit status $status; the log is $out/log.txt" >&2; exit $status; }
if [ -z "$cpu" ]; then
    echo "validation loss, and the clock in seconds:"
    awk 'NR == FNR { if (match($0, /^step:[0-9]+/)) { step = substr($0, 6, RLENGTH - 5)
                         if (match($0, /val_loss:[^ ]+/)) loss[step] = substr($0, RSTART + 9, RLENGTH - 9)
                         if (match($0, /train_time:[0-9]+/)) time = substr($0, RSTART + 11, RLENGTH - 11) / 1000 }
                     next }
         { print $0, (FNR == 1 ? "this-run" : $1 == "seconds" ? time : $1 in loss ? loss[$1] : "-") }' \
        "$out/log.txt" <(record_curve) | columns
fi
