#!/usr/bin/env bash
# From nothing to a trained model: installs what is missing, builds, gets an English text, trains a
# byte-level model on it for about two minutes on two cores, shows val loss, a sample and the loss curve.
#
#   ./scripts/quickstart.sh [TEXT-FILE] [--flag value ...]     flags go to the trainer, e.g. --steps 100
#
# Without TEXT-FILE: tinyshakespeare, or, where its address cannot be reached, Debian's package fortunes.
# Into runs/quickstart, or runs/quickstart-2, -3 .. where there are runs already. Ctrl-C ends the training with a checkpoint and the
# curve, and with status 75; the same command with --resume auto then goes on in the last of these folders.
set -eu
[ "${1:-}" = --help ] && { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; }
text=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    if ! [ -f "$1" ] || ! [ -r "$1" ]; then echo "quickstart: $1 is not a file that can be read" >&2; exit 1; fi
    text=$(realpath "$1"); shift
fi
cd "$(dirname "$0")/.."
. scripts/install.sh
. scripts/run_child.sh

text_url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
text_sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# ---- build ---------------------------------------------------------------------------------
need_build_tools
jobs=$(nproc 2> /dev/null || echo 2)
PATH="$PATH:/usr/local/cuda/bin"
if nvidia-smi -L > /dev/null 2>&1 && command -v nvcc > /dev/null; then
    program=train_gpt2
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    [ "$arch" = 90 ] && arch=90a
    echo "building for the GPU (sm_$arch)"
    make -s train_gpt2 ARCH="$arch"
else
    program=train_gpt2_cpu
    echo "building for the CPU (a GPU and nvcc are not both here)"
fi
# The small tools run on the CPU in any case.
targets=(build/text_to_shards build/plot_loss)
[ $program = train_gpt2_cpu ] && targets+=(train_gpt2_cpu)
make -s -j"$jobs" "${targets[@]}"

# ---- a text --------------------------------------------------------------------------------
is_tinyshakespeare() { echo "$text_sha256  $1" | sha256sum --check --status 2> /dev/null; }

# data/tinyshakespeare.txt, or returns 1.
fetch_text() {
    is_tinyshakespeare data/tinyshakespeare.txt && return 0
    echo "fetching tinyshakespeare from $text_url"
    if ! command -v curl > /dev/null; then install curl ca-certificates || return 1; fi
    if curl --fail --silent --location --connect-timeout 10 --max-time 120 --output data/text.part "$text_url" &&
       is_tinyshakespeare data/text.part; then
        mv data/text.part data/tinyshakespeare.txt
    else
        rm -f data/text.part
        echo "that address cannot be reached or holds another file"
        return 1
    fi
}

# data/fortunes.txt from the package of quotations that Debian and Ubuntu carry, or returns 1.
fortunes_text() {
    local folder=/usr/share/games/fortunes file
    echo "taking the texts of the package fortunes instead"
    [ -e $folder/science ] || install fortunes || return 1
    for file in "$folder"/*; do      # beside each text lie an index and a link to the text
        case "$file" in *.dat | *.u8) ;; *) [ -f "$file" ] && cat "$file" ;; esac
    done > data/fortunes.txt
    [ -s data/fortunes.txt ]
}

mkdir -p data
if [ -z "$text" ]; then
    if fetch_text; then
        text=data/tinyshakespeare.txt
    elif fortunes_text; then
        text=data/fortunes.txt
    else
        echo "quickstart: no text to train on; name one: ./scripts/quickstart.sh FILE   (plain text, some 100 KB or more)" >&2
        exit 1
    fi
fi
echo "text: $text, $(wc -c < "$text") bytes"
name=$(basename "$text" .txt | tr -c 'A-Za-z0-9.\n-' '_')      # it becomes part of a pattern
rm -f "data/${name}"_{train,val}_[0-9]*.bin
build/text_to_shards --out "data/$name" "$text"

# ---- train ---------------------------------------------------------------------------------
out="" resume=""
for ((i = 1; i <= $#; i++)); do
    j=$((i + 1))
    case "${!i}" in
        --out) out="${!j:-}" ;;
        --out=*) out="${!i#--out=}" ;;
        --resume | --resume=*) resume=yes ;;
    esac
done
[ -n "$out" ] || { out=$(run_folder runs/quickstart "$resume"); set -- --out "$out" "$@"; }
run_child ./$program --recipe quickstart --train "data/${name}_train_*.bin" --val "data/${name}_val_*.bin" "$@"
[ $status -eq 0 ] || [ $status -eq 75 ] || exit $status
echo "loss curve: $(build/plot_loss "$out/log.txt" --out "$out/loss.svg")"
if [ $status -eq 0 ]; then echo "weights: $out/model.safetensors"; else echo "to go on: the same command with --resume auto"; fi
exit $status
