#!/usr/bin/env bash
# test/generate.sh PROGRAM: text from saved weights, --load FILE --prompt TEXT --sample-tokens N and nothing else.
#   a byte-level model and one with a tokenizer of its own; each recipe; any bytes, none, or too many for a prompt; temperature, seed
#   a cache of keys and values gives the tokens of a model that reads all of them anew
#   a tokenizer that has moved, another one, a file that is of another version, or no model at all: one message
set -u
program=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 1
tools=$(dirname "$program")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
has() { grep -qaE -- "$3" "$2"; check $? "$1: $3 (found: $(head -c 200 "$2" | head -1))"; }      # has NAME FILE REGEX
same() { [ -s "$2" ] && cmp -s "$2" "$3"; check $? "$1"; }
base=(--layers 2 --heads 2 --channels 64 --seq-len 32 --micro-batch 4 --batch-tokens 256 --val-tokens 64 --val-every 100 --steps 6
      --batching stream --epochs 0)
train() {      # train NAME SHARDS FLAGS...: a small model into $work/NAME; FLAGS replace those of base
    local name="$1" shards="$2" line=() i; shift 2
    for ((i = 0; i < ${#base[@]}; i += 2)); do
        [[ " $* " == *" ${base[i]} "* ]] || line+=("${base[i]}" "${base[i + 1]}")
    done
    "$program" "${line[@]}" --train "$work/${shards}_train_*.bin" --val "$work/${shards}_val_*.bin" --out "$work/$name" "$@" \
        > "$work/$name.log" 2>&1
    check $? "$name is trained: $(grep -a "^train_gpt2:" "$work/$name.log" | head -1)"
}
sample() {      # sample NAME FILE FLAGS...: its text into $work/NAME.txt, what it complains of into $work/NAME.err
    local name="$1" file="$2"; shift 2
    timeout -k 10 60 "$program" --load "$file" "$@" > "$work/$name.txt" 2> "$work/$name.err"
}
sample_well() { sample "$@"; local status=$?; check $status "$1 (exit $status): $(head -1 "$work/$1.err")"; }
refused() {      # refused REGEX FILE FLAGS...: one message
    local words="$1" file="$2"; shift 2
    sample refused "$file" "$@"; local status=$?
    [ $status -eq 1 ] && grep -qE -- "$words" "$work/refused.err" && [ "$(grep -c '^train_gpt2:' "$work/refused.err")" -eq 1 ]
    local ok=$?
    check $ok "refused: $* (exit $status: $(head -1 "$work/refused.err"))"
}

# ---- bytes ---------------------------------------------------------------------------------
"$tools/text_to_shards" --out "$work/bytes" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
records=(--layers 12 --table-rows 320 --seq-len 256 --micro-batch 1 --batch-tokens 512 --val-seq-len 256 --val-batch 1
         --val-tokens 256 --extension-steps 1)
for recipe in sub3 normuon modern untied unet; do
    flags=()
    case $recipe in sub3|normuon) flags=("${records[@]}") ;; esac
    train $recipe bytes --recipe $recipe --vocab 320 "${flags[@]}"
    model="$work/$recipe/model.safetensors"
    before=$(ls)
    sample_well $recipe-1 "$model" --prompt "static int " --sample-tokens 60
    has "$recipe: the prompt comes first" "$work/$recipe-1.txt" '^static int '
    [ "$(wc -c < "$work/$recipe-1.txt")" -ge 71 ]; check $? "$recipe: and 60 tokens behind it"
    [ "$(ls)" = "$before" ]; check $? "$recipe: no file is left"
    # Of the older ones a model sees 32 tokens: after these the last half is read once more.
    HOST_THREADS=1 HOST_SCHED=7 HOST_STREAMS=lazy sample_well $recipe-2 "$model" --prompt "static int " --sample-tokens 60
    same "$recipe: the same text again, in another order of execution" "$work/$recipe-1.txt" "$work/$recipe-2.txt"
    sample_well $recipe-3 "$model" --prompt "static int " --sample-tokens 20 --sample-temperature 0
    sample_well $recipe-4 "$model" --prompt "static int " --sample-tokens 20 --sample-temperature 0 --seq-len 512
    same "$recipe: as far as it sees everything the length does not matter" "$work/$recipe-3.txt" "$work/$recipe-4.txt"
    # What is drawn in turn is what is drawn behind a longer prompt: the cache holds what would be read.
    for n in 4 9 15; do
        start=$(head -c $((11 + n)) "$work/$recipe-3.txt"; echo .)
        [ "$(iconv -c -f utf8 -t ascii <<< "$start")" = "$start" ] || continue      # ends within a character, or has none
        sample_well step "$model" --prompt "${start%.}" --sample-tokens $((20 - n)) --sample-temperature 0
        same "$recipe: the text goes on the same from its token $n" "$work/$recipe-3.txt" "$work/step.txt"
        steps=$((${steps:-0} + 1))
    done
done
[ "${steps:-0}" -ge 6 ]; check $? "texts were gone on with: ${steps:-0}"
sample_well seed "$model" --prompt "static int " --sample-tokens 60 --seed 2
! cmp -s "$work/seed.txt" "$work/unet-1.txt"; check $? "another seed, another text"
sample_well cold-1 "$model" --prompt "static int " --sample-tokens 20 --sample-temperature 0 --seed 2
same "at temperature 0 the seed does not matter" "$work/cold-1.txt" "$work/unet-3.txt"
sample_well cold-2 "$model" --prompt "static int " --sample-tokens 20 --sample-top-k 1
same "the likeliest of one" "$work/cold-2.txt" "$work/unet-3.txt"
sample_well none "$model" --sample-tokens 20
sample_well empty "$model" --prompt '' --sample-tokens 20
same "no prompt is an empty one" "$work/none.txt" "$work/empty.txt"
sample_well odd "$model" --prompt $'\xff\xc3(\x80' --sample-tokens 5
has "bytes that are no text" "$work/odd.txt" $'^\xef\xbf\xbd\xef\xbf\xbd\\(\xef\xbf\xbd'
sample_well long "$model" --prompt "$(printf '%0100d' 7)" --sample-tokens 5
has "a prompt that is too long" "$work/long.err" 'the prompt has 101 tokens, the model sees 32: it does not see the first 69'
has "a prompt that is too long" "$work/long.txt" '^0{99}7'
! grep -q . "$work/none.err"; check $? "and otherwise no complaint"

# ---- a tokenizer ---------------------------------------------------------------------------
"$tools/train_bpe" --vocab 557 --out "$work/bpe" train_gpt2.cu > /dev/null; check $? "train_bpe"
"$tools/train_bpe" --vocab 547 --out "$work/other" train_gpt2.cu > /dev/null; check $? "train_bpe, another"
cp train_gpt2.cu "$work/text.txt"
"$tools/tokenize" --tokenizer "$work/bpe" --out "$work/words" --val-tokens 5000 "$work/text.txt" > /dev/null 2>&1; check $? "tokenize"
train words words --recipe modern --vocab 576 --tokenizer "$work/bpe" --sample-tokens 8
model="$work/words/model.safetensors"
has "samples during training are text" "$work/words/log.jsonl" '"event":"sample","step":6,"text":"[^"]*[^0-9 "]'
sample_well words-1 "$model" --prompt "static int caf"$'\xc3\xa9' --sample-tokens 20
has "a prompt in tokens" "$work/words-1.txt" $'^static int caf\xc3\xa9'
mv "$work/bpe" "$work/moved"
refused "--tokenizer $work/bpe: No such file.*learned by $model" "$model" --prompt x --sample-tokens 5
sample_well words-2 "$model" --prompt "static int caf"$'\xc3\xa9' --sample-tokens 20 --tokenizer "$work/moved"
same "a tokenizer that has moved" "$work/words-1.txt" "$work/words-2.txt"
refused "--tokenizer $work/other has hash [0-9a-f]{16}, but $model learned the tokens of hash [0-9a-f]{16}" "$model" --prompt x \
    --sample-tokens 5 --tokenizer "$work/other"
refused 'has 50257 tokens, but --vocab is 320' "$work/unet/model.safetensors" --prompt x --sample-tokens 5 --tokenizer test/data/gpt2
sample_well numbers "$model" --sample-tokens 5 --tokenizer ''
has "without a tokenizer its tokens are numbers" "$work/numbers.txt" '^[0-9]+( [0-9]+){4}$'
refused '--prompt needs the vocabulary' "$model" --prompt x --sample-tokens 5 --tokenizer ''
train plain words --recipe modern --vocab 576 --sample-tokens 8
has "numbers during training" "$work/plain/log.jsonl" '"event":"sample","step":6,"text":"[0-9]+( [0-9]+){7}"'

# ---- files that will not do ----------------------------------------------------------------
model="$work/unet/model.safetensors"
refused 'sample-tokens' "$model" --prompt x
refused 'no tensor|shape' "$model" --prompt x --sample-tokens 5 --layers 4
refused 'cannot be opened' "$work/none.safetensors" --prompt x --sample-tokens 5
refused 'does not say what its model is' test/golden/r8_micro64/init.safetensors --prompt x --sample-tokens 5
broken() { LC_ALL=C sed -e "1,/$1/s/$1/$2/" "$model" > "$work/broken.safetensors"; }      # of the same length, in the header
broken '\\"layers\\":' '\\"wings\\" :'
refused "broken.safetensors: there is no flag 'wings', with which it was saved" "$work/broken.safetensors" --prompt x --sample-tokens 5
broken '\\"layers\\":2' '\\"layers\\":x'
refused 'broken.safetensors: its flags, byte [0-9]+: found .*expected a number' "$work/broken.safetensors" --prompt x --sample-tokens 5

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
