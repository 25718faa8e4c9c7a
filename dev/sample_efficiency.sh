#!/usr/bin/env bash
# How many tokens an optimizer and a recipe need, at a size that a CPU trains in a minute: byte-level
# tinyshakespeare, four layers of 128 channels, 300 steps of 2,048 tokens, the validation loss of 32,768 tokens.
#
#   dev/sample_efficiency.sh PROGRAM SHARDS OUT      SHARDS: prefix of _train_*.bin and _val_*.bin (dev/text_to_shards)
#
# First the learning rate of the matrices (AdamW: of everything) is chosen among three or four by the loss of seed 1,
# then seeds 2 and 3 are run with it. Prints mean and sd of the final loss, the steps to AdamW's mean final loss,
# and all losses of the choice, so that a best value at the edge of its list shows. Two runs at a time, one thread each.
# dev/LOG.md has the table of a run.
set -u
program=$(realpath "$1") shards=$(realpath -m "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
common=(--layers 4 --heads 2 --channels 128 --vocab 320 --seq-len 128 --micro-batch 16 --batch-tokens 2048 --steps 300 --val-every 20
        --val-tokens 32768 --batching stream --epochs 0 --train "${shards}_train_*.bin" --val "${shards}_val_*.bin")
fp32=(--norm-eps 1.1920929e-7 --qk-norm-eps 1.1920929e-7 --rotary-round-bf16 0)
records=(--table-rows 0 --no-attention "" --value-embeds "0:0 1:1 2:0 3:1" --document-mask 0 --window-block 32 --val-seq-len 0
         --val-batch 0 --fp8-head 0 --bf16-tables 0)

# What a name stands for; LR is put in.
flags_of() {
    case $1 in
        adamw)   echo "--recipe modern --optimizer adamw --adamw-lr LR" ;;
        muon)    echo "--recipe modern --muon-lr LR" ;;
        normuon) echo "--recipe modern --muon-lr LR --muon-scale aspect --muon-form lerp --muon-polar 1 --muon-beta2 0.95" ;;
        unet)    echo "--recipe unet --muon-lr LR --muon-momentum-warmup 30 --bf16-tables 0 --bf16-scalars 0" ;;
        sub3)    echo "--recipe sub3 --muon-lr LR --muon-momentum-warmup 30 --window-max 128" ;;
        record45) echo "--recipe normuon --muon-lr LR --muon-momentum-warmup 30 --muon-momentum-cooldown 7 --extension-steps 6 --bf16-head 0
                        --bf16-state 0 --gated-skips 1>2 --backout 2 --window-extension 4 --window-final 0" ;;
    esac
}
one() {      # one NAME LR SEED: a run into OUT/NAME-LR-SEED, unless it is there
    local name="$1" lr="$2" seed="$3" words more=()
    local to="$out/$name-$lr-$seed"
    grep -q '^RESULT' "$to/log.txt" 2> /dev/null && return
    read -r -d '' -a words <<< "$(flags_of "$name")"
    words=("${words[@]/#LR/$lr}")
    case $name in
        sub3)     more=("${records[@]}" --long-layers "0 3") ;;
        record45) more=("${records[@]}" --no-layers "" --long-layers "1 3" --window-steps "1 2 3") ;;
    esac
    HOST_THREADS=1 "$program" "${words[@]}" "${common[@]}" "${fp32[@]}" ${more[@]+"${more[@]}"} --seed "$seed" --out "$to" --resume auto \
        > "$to.txt" 2>&1 || { echo "$name $lr $seed: $(grep -m1 '^train_gpt2' "$to.txt")" >&2; }
}
final() { sed -nE 's/^RESULT val_loss:([0-9.]+).*/\1/p' "$out/$1-$2-$3/log.txt" 2> /dev/null; }
declare -A lrs=([adamw]="0.0005 0.001 0.002 0.004 0.008" [muon]="0.0004 0.0008 0.0016 0.0032" [normuon]="0.005 0.01 0.02 0.04"
                [unet]="0.01 0.02 0.04" [sub3]="0.0125 0.025 0.05" [record45]="0.0075 0.015 0.03")
names=(adamw muon normuon unet sub3 record45)
wait_for_one() { while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done; }

for name in "${names[@]}"; do
    for lr in ${lrs[$name]}; do wait_for_one; one "$name" "$lr" 1 & done
done
wait
declare -A best
for name in "${names[@]}"; do
    best[$name]=$(for lr in ${lrs[$name]}; do echo "$(final "$name" "$lr" 1) $lr"; done | grep '^[0-9]' | sort -n | head -1 | cut -d' ' -f2)
    for seed in 2 3; do wait_for_one; one "$name" "${best[$name]}" $seed & done
done
wait
statistics() { awk '{ n++; s += $1; q += $1 * $1 } END { m = s / n; d = q - n * m * m; printf("%.4f %.4f", m, (n > 1 && d > 0) ? sqrt(d / (n - 1)) : 0) }'; }
target=$(for seed in 1 2 3; do final adamw "${best[adamw]}" $seed; done | statistics | cut -d' ' -f1)
printf '%-9s %11s  %-8s  %-15s  %-20s  %s\n' what parameters rate "final loss (sd)" "steps to $target (sd)" "losses of the choice"
for name in "${names[@]}"; do
    lr=${best[$name]}
    losses=$(for seed in 1 2 3; do final "$name" "$lr" $seed; done | statistics)
    steps=$(for seed in 1 2 3; do
        sed -nE 's/^step:([0-9]+)\/.* ?val_loss:([0-9.]+).*/\1 \2/p' "$out/$name-$lr-$seed/log.txt" | awk -v t="$target" '
            $2 <= t && !done { print before + ($1 - before) * (last - t) / (last - $2); done = 1 } { before = $1; last = $2 }'
    done | statistics)
    parameters=$(sed -nE 's/^parameters ([0-9]+),.*/\1/p' "$out/$name-$lr-1.txt")
    choice=$(for lr2 in ${lrs[$name]}; do printf '%s: %s  ' "$lr2" "$(final "$name" "$lr2" 1)"; done)
    printf '%-9s %11s  %-8s  %s (%s)  %8.1f (%.1f)       %s\n' "$name" "$parameters" "$lr" $losses $steps "$choice"
done
