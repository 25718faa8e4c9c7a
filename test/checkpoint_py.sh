#!/usr/bin/env bash
# test/checkpoint_py.sh PROGRAM [PYTHON]: dev/checkpoint.py, a second implementation of every recipe, on what the trainer saves.
#   every recipe, within the schedules of windows, YaRN and Adam's second steps and at the end: the loss is the one that was logged
#   conversion: the weights bit for bit, one rank's state and that of two and three; the trainer loads the file
#   the table's norms; damage of every kind, weights of another loss: refused, or told apart
# Needs torch and safetensors for PYTHON (python3, or else /usr/bin/python3), and mpirun for the ranks.
set -u
program=$(realpath "$1")
tools=$(dirname "$program")
python=${2:-}
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export HOST_THREADS=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
skip() { echo "skip  $1"; skipped=$((skipped + 1)); }
closing_line() {
    if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
}
for candidate in ${python:-python3 /usr/bin/python3}; do
    "$candidate" -c 'import numpy, torch, safetensors.torch' 2> /dev/null && { python=$candidate; found=1; break; }
done
if [ -z "${found:-}" ]; then skip "no torch and safetensors for ${python:-python3}: pip install torch safetensors"; closing_line; exit; fi


tool() { "$python" dev/checkpoint.py "$@"; }
base=(--layers 4 --heads 2 --channels 64 --vocab 320 --steps 12 --val-every 3 --checkpoint-every 3 --keep 20 --scalar-lr 0.2 --epochs 0
      --batching stream)
train() {      # train NAME RANKS FLAGS...: a run into $work/NAME; FLAGS replace those of base
    local name="$1" ranks="$2" line=() i; shift 2
    [ "$ranks" -gt 1 ] && line=(mpirun -np "$ranks")
    line+=("$program" --train "$work/text_train_*.bin" --val "$work/text_val_*.bin" --out "$work/$name")
    for ((i = 0; i < ${#base[@]}; i += 2)); do
        [[ " $* " == *" ${base[i]} "* ]] || line+=("${base[i]}" "${base[i + 1]}")
    done
    timeout -k 10 60 "${line[@]}" "$@" > "$work/$name.txt" 2>&1
    check $? "$name is trained: $(grep -a '^train_gpt2:' "$work/$name.txt" | head -1)"
}
count() {      # count NUMBER REGEX FILE NAME
    local found; found=$(grep -cE -- "$2" "$3")
    [ "$found" -eq "$1" ]; check $? "$4: $found lines of $1 with '$2': $(grep -vE -m 1 -- "$2" "$3")"
}
checks() {      # checks NAME ARGUMENTS... < PYTHON: it prints a line for each check, "pass" or "FAIL  ..."
    local name="$1"; shift
    PYTHONPATH=dev "$python" - "$@" > "$work/checks.txt" 2> "$work/checks.err"; check $? "$name: $(tail -1 "$work/checks.err")"
    grep '^FAIL' "$work/checks.txt"
    passed=$((passed + $(grep -c '^pass' "$work/checks.txt"))) failed=$((failed + $(grep -c '^FAIL' "$work/checks.txt")))
}

# Documents of 400 bytes, so that attention meets many borders.
mkdir "$work/documents"
for file in train_gpt2.cu llmc/*.cuh; do split -b 400 -a 4 "$file" "$work/documents/$(basename "$file")."; done
"$tools/text_to_shards" --out "$work/text" "$work"/documents/* > /dev/null; check $? "text_to_shards"

# ---- losses --------------------------------------------------------------------------------
# Learning rates so high that in a few steps every scalar and gate comes to matter. The validation's sequences are not those of
# training: 1100 tokens are several blocks of queries and several parts of the logits, 1500 have a part of a row left.
short=(--seq-len 64 --micro-batch 4 --batch-tokens 512 --val-seq-len 96 --val-tokens 700 --muon-lr 0.1)
long=(--layers 12 --seq-len 256 --micro-batch 1 --batch-tokens 512 --val-seq-len 1100 --val-batch 1 --val-tokens 1500 --muon-lr 0.2)
recipes=(modern untied unet quickstart sub3 sub3_20 normuon)
for recipe in "${recipes[@]}"; do
    case $recipe in
    sub3*)   flags=("${long[@]}" --table-rows 300 --window-block 16 --window-max 100) ;;
    normuon) flags=("${long[@]}" --extension-steps 4 --window-block 8 --window-steps "2 5 7" --window-extension 8 --window-final 20) ;;
    *)       flags=("${short[@]}") ;;
    esac
    train $recipe 1 --recipe $recipe "${flags[@]}"
done
# The two differ by rounding in fp32, by 3e-7 as measured; without a window's last token it would be 1e-5. bf16: 8 bits of every
# activation, 1.2e-3 as measured, for which the tool allows 0.005 if the file says so.
tolerance=(--tolerance 3e-6) ends=(--tolerance 3e-6)
grep -q '^"precision":"bf16"' "$work/modern/checkpoints/step_000003/manifest.json" && tolerance=() ends=(--tolerance 0.005)
tool loss "${tolerance[@]}" "$work"/*/checkpoints/step_* > "$work/losses.txt" 2> "$work/losses.err"
check $? "losses: $(head -1 "$work/losses.err")"
count $((4 * ${#recipes[@]})) '/step_[0-9]+: step [0-9]+: loss [0-9.]+ over (700|1500) predictions, logged [0-9.]+: equal,' "$work/losses.txt" "losses"
tool loss "${ends[@]}" "$work"/*/model.safetensors > "$work/ends.txt" 2> "$work/ends.err"
check $? "losses at the end: $(head -1 "$work/ends.err")"
count ${#recipes[@]} 'model.safetensors: step 12: .* equal,' "$work/ends.txt" "losses at the end"

tool loss "$work/unet/model.safetensors" --val-tokens 100 > "$work/few.txt"; check $? "fewer tokens"
count 1 'over 100 predictions, not compared: the run.s are 700$' "$work/few.txt" "fewer tokens"
tool loss "$work/unet/model.safetensors" --val "$work/text_train_*.bin" > "$work/other.txt"; [ $? -eq 1 ]; check $? "other tokens: exit status"
count 1 'NOT EQUAL, difference' "$work/other.txt" "other tokens"
cp "$work/unet/model.safetensors" "$work/alone.safetensors"
tool loss "$work/alone.safetensors" > "$work/alone.txt"; check $? "without a log"
count 1 'not compared: .*log.jsonl has no validation of this step$' "$work/alone.txt" "without a log"

# ---- conversion ----------------------------------------------------------------------------
# The weights at the end are those of the last checkpoint's masters, where it has any.
for recipe in unet normuon; do
    tool convert "$work/$recipe/checkpoints/step_000012" "$work/$recipe.safetensors" > "$work/convert.txt" 2>&1
    check $? "$recipe is converted: $(head -1 "$work/convert.txt")"
done
checks "conversion" "$work" unet normuon << 'EOF'
import sys
import torch
from safetensors.torch import load_file
for recipe in sys.argv[2:]:
    a, b = load_file(f"{sys.argv[1]}/{recipe}.safetensors"), load_file(f"{sys.argv[1]}/{recipe}/model.safetensors")
    same = a.keys() == b.keys() and all(a[k].dtype == torch.float32 and torch.equal(a[k], b[k]) for k in a)
    print("pass" if same else f"FAIL  {recipe}: the converted weights are those of the end")
EOF
train again 1 --recipe unet "${short[@]}" --load "$work/unet.safetensors" --steps 1 --checkpoint-every 0
end=$(grep -oE '^step:12/12 val_loss:[0-9.]+' "$work/unet/log.txt" | cut -d: -f3)
[ -n "$end" ] && grep -q "^step:0/1 val_loss:$end " "$work/again/log.txt"; check $? "the trainer loads it: a loss of $end"

# The state of normuon behind its fifth step, when gradients wait for Adam's next: of one rank, and put together from several. Six
# sequences of a step divide by 1, 2 and 3. In fp32 they differ by the order of sums, by 2e-4 of a tensor's norm as measured; in bf16
# Newton-Schulz makes 0.3 of that.
if command -v mpirun > /dev/null && ldd "$program" | grep -q libmpi; then
    for ranks in 1 2 3; do
        train ranks-$ranks $ranks --recipe normuon "${flags[@]/#512/1536}" --steps 5 --checkpoint-every 5 < /dev/null
        tool convert --state "$work/ranks-$ranks/checkpoints/step_000005" "$work/ranks-$ranks.safetensors" > "$work/convert.txt" 2>&1
        check $? "$ranks ranks are converted: $(head -1 "$work/convert.txt")"
    done
    checks "state of several ranks" "$work" ${#tolerance[@]} << 'EOF'
import json
import sys
from safetensors.torch import load_file
work, exact = sys.argv[1], sys.argv[2] != "0"
one = load_file(f"{work}/ranks-1.safetensors")
kinds = {name.rsplit(".", 1)[-1] for name, x in one.items() if x.abs().max() > 0}
print("pass" if {"m", "v", "grad"} <= kinds else f"FAIL  a state to compare: {kinds}")
for ranks in (2, 3):
    all = load_file(f"{work}/ranks-{ranks}.safetensors")
    far = [name for name in one if name not in all or all[name].shape != one[name].shape or
           not (all[name] - one[name]).norm() <= (1e-3 if exact else 0.5) * one[name].norm()]
    print("pass" if not far and len(all) == len(one) else f"FAIL  {ranks} ranks have another state: {far[:5]}")
    with open(f"{work}/ranks-{ranks}/checkpoints/step_000005/manifest.json") as file:
        parts = [t for t in json.load(file)["tensors"] if t["offset"] > 0]
    print("pass" if parts else f"FAIL  {ranks} ranks have parts of tensors")
EOF
else
    skip "several ranks: no mpirun, or a program built without it"
fi

# ---- the table -----------------------------------------------------------------------------
tool table "$work/normuon/checkpoints/step_000012" > "$work/table.txt"; check $? "table"
checks "table" "$work/normuon/checkpoints/step_000012" "$work/table.txt" << 'EOF'
import sys
from safetensors.torch import load_file
weights, state = load_file(f"{sys.argv[1]}/model.safetensors"), load_file(f"{sys.argv[1]}/state.rank0.safetensors")
with open(sys.argv[2]) as file:
    rows = {line.split()[0]: line.split()[1:] for line in file}
for name in ("wte.weight", "h.1.attn.c_q.weight", "h.11.attn.lambdas"):
    x, m, v = (t.double() for t in (weights[name], state[f"{name}.m"], state[f"{name}.v"]))
    want = ["x".join(map(str, x.shape)), str(weights[name].dtype)[6:]]
    for t in (x, m, v):
        want += [f"{t.square().sum().sqrt():.4g}", f"{t.abs().max():.4g}"]
    ok = rows[name][:4] == want[:4] and all(n in rows[name][4:] for n in want[4:])
    print("pass" if ok else f"FAIL  the table's row of {name}: {rows[name]}, expected {want}")
print("pass" if len(rows) == len(weights) + 2 else f"FAIL  the table has {len(rows)} rows")
EOF

# ---- what is refused -----------------------------------------------------------------------
checks "damage" "$work/normuon/checkpoints/step_000012" "$work/damaged" << 'EOF'
import json
import os
import re
import shutil
import sys
import zlib
from checkpoint import Checkpoint, Problem
whole, damaged = sys.argv[1:]


def flip(name, at):
    def change():
        with open(f"{damaged}/{name}", "r+b") as file:
            file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
            byte = file.read(1)[0] ^ 1
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte]))
    return change


def cut(name, count):
    return lambda: os.truncate(f"{damaged}/{name}", os.path.getsize(f"{damaged}/{name}") - count)


def edit(pattern, text):
    """With the manifest's checksum made right again."""
    def change():
        with open(f"{damaged}/manifest.json", "rb") as file:
            raw = file.read()
        start = raw.rstrip(b"\n").rfind(b"\n") + 1
        raw, count = re.subn(pattern, text, raw[:start], count=1)
        assert count == 1, pattern
        with open(f"{damaged}/manifest.json", "wb") as file:
            file.write(raw + b'"crc32":"%08x"}\n' % zlib.crc32(raw))
    return change


state = "state.rank0.safetensors"
row = rb'\{"name":"wte.weight","kind":"m",[^}]*\},\n'
cases = [
    (flip(state, -1), r"state.rank0.safetensors: .*: found crc32 [0-9a-f]{8}, expected [0-9a-f]{8}: it was damaged"),
    (flip("model.safetensors", -5000), r"model.safetensors: .*: found crc32 [0-9a-f]{8}, expected"),
    (flip(state, 40), r"state.rank0.safetensors: found another header, expected that of the manifest"),
    (cut(state, 1), r"state.rank0.safetensors: found [0-9]+ bytes, expected [0-9]+"),
    (lambda: os.remove(f"{damaged}/{state}"), r"state.rank0.safetensors: found no such file"),
    (flip("manifest.json", 100), r"manifest.json: found crc32 [0-9a-f]{8}, expected [0-9a-f]{8}: it was changed"),
    (cut("manifest.json", 20), r"manifest.json: found .* expected a last line with its crc32"),
    (lambda: os.remove(f"{damaged}/manifest.json"), r"damaged: no manifest.json, so this is no checkpoint"),
    (edit(rb'"version":1', rb'"version":2'), r"manifest.json: found version 2, expected 1"),
    (edit(rb'modded-llm.c checkpoint', rb'other checkpoint'), r"found format 'other checkpoint'"),
    (edit(rb'"step":', rb'"steep":'), r"its manifest or metadata: KeyError\('step'\)"),
    (edit(rb'"tokens":', rb'"tokens"'), r"its manifest or metadata: JSONDecodeError"),
    (edit(row, b""), r"state.rank0.safetensors: found wte.weight.m, expected what the manifest lists alone"),
    (edit(rb"(" + row + rb")", rb"\1\1"), r"wte.weight.m: found no such tensor, expected each that the manifest lists, once"),
    (edit(rb'("wte.weight","kind":)"m"', rb'\1"v"'), r"wte.weight.v: found crc32"),
    (edit(rb'("wte.weight","kind":)"weight"', rb'\1"wait"'), r"wte.weight.wait: found no such tensor"),
    (edit(rb'("wte.weight","kind":"m".*"dtype":)"F32"', rb'\1"BF16"'), r"wte.weight.m: found torch.float32, expected BF16"),
    (edit(rb'("wte.weight","kind":"m".*"shape":)\[320,64\]', rb'\1[64,320]'), r"wte.weight.m: found shape \[320, 64\], expected \[64, 320\]"),
    (edit(rb'("wte.weight","kind":"m".*"shape":)\[320,64\]', rb'\1[640,64]'), r"wte.weight.m: found shape \[320, 64\], expected \[20480\]"),
    (edit(rb'("wte.weight","kind":"m".*"offset":)0', rb'\1 9'), r"wte.weight.m: found 20480 elements from 9, expected a part of 20480"),
]
for i, (change, words) in enumerate([(lambda: None, None)] + cases):
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    change()
    try:
        Checkpoint(damaged)
        found = None
    except Problem as problem:
        found = str(problem)
    ok = found is None if words is None else found is not None and re.search(words, found)
    print("pass" if ok else f"FAIL  damage {i}: {found!r}, expected {words!r}")
EOF
refused() {      # refused REGEX ARGUMENTS...: one message, exit status 1
    local words="$1"; shift
    tool "$@" > "$work/refused.txt" 2>&1; local status=$?
    [ $status -eq 1 ] && grep -qE -- "^checkpoint: $words" "$work/refused.txt" && ! grep -q Traceback "$work/refused.txt"
    local ok=$?
    check $ok "refused: $* (exit $status: $(head -1 "$work/refused.txt"))"
}
refused '.*none: .*No such file' table "$work/none"
refused '.*modern: no manifest.json, so this is no checkpoint' table "$work/modern"
refused '.*init.safetensors: found no flags and step in its metadata' table test/golden/r8_micro64/init.safetensors
refused '.*text_val_000000.bin: ' table "$work/text_val_000000.bin"
refused '--val .*none.*: no such file' loss "$work/unet/model.safetensors" --val "$work/none*"
refused '--val .*: [0-9]+ tokens are there, and 1000001 are needed' loss "$work/unet/model.safetensors" --val-tokens 1000000
refused '.*unet.safetensors: found weights alone, expected a checkpoint' convert "$work/unet.safetensors" "$work/x.safetensors" --state
refused '.*none/x.safetensors: ' convert "$work/unet.safetensors" "$work/none/x.safetensors"

closing_line
[ $failed -eq 0 ]
