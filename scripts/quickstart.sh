#!/usr/bin/env bash
# From nothing to a trained model: installs what is missing, builds, gets an English text, trains a
# byte-level model on it for about two minutes on two cores, shows val loss, a sample and the loss curve.
#
#   ./scripts/quickstart.sh [TEXT-FILE] [--flag value ...]     flags go to the trainer, e.g. --steps 100
set -eu
cd "$(dirname "$0")/.."
. scripts/install.sh

text_url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
text_sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

need_build_tools
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1 && command -v nvcc > /dev/null; then
    program=train_gpt2
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    [ "$arch" = 90 ] && arch=90a
    echo "building for the GPU (sm_$arch)"
    make -s train_gpt2 ARCH="$arch"
else
    program=train_gpt2_cpu
    echo "building for the CPU"
    make -s train_gpt2_cpu
fi
make -s build/text_to_shards build/plot_loss

# ---- a text --------------------------------------------------------------------------------
mkdir -p data
text=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    text="$1"; shift
    [ -r "$text" ] || { echo "quickstart: cannot read $text" >&2; exit 1; }
elif echo "$text_sha256  data/tinyshakespeare.txt" | sha256sum --check --status 2> /dev/null; then
    text=data/tinyshakespeare.txt
else
    echo "fetching tinyshakespeare from $text_url"
    need curl curl
    if curl --fail --silent --location --connect-timeout 10 --max-time 120 --output data/text.part "$text_url" &&
       echo "$text_sha256  data/text.part" | sha256sum --check --status; then
        mv data/text.part data/tinyshakespeare.txt
        text=data/tinyshakespeare.txt
    else
        rm -f data/text.part
        echo "that host cannot be reached or gave another file; taking the texts of the package fortunes instead"
        need /usr/share/games/fortunes fortunes
        for file in /usr/share/games/fortunes/*; do
            case "$file" in *.dat|*.u8) ;; *) cat "$file" ;; esac
        done > data/fortunes.txt
        text=data/fortunes.txt
    fi
fi
echo "text: $text, $(wc -c < "$text") bytes"
name=$(basename "$text" .txt)
build/text_to_shards --out "data/$name" "$text"

# ---- train ---------------------------------------------------------------------------------
out="runs/quickstart"
rm -rf "$out"
status=0
./$program --recipe quickstart --train "data/${name}_train_*.bin" --val "data/${name}_val_*.bin" --out "$out" "$@" || status=$?
[ $status -eq 0 ] || [ $status -eq 130 ] || exit $status
build/plot_loss "$out/log.txt" --out "$out/loss.svg"
exit $status
