#!/usr/bin/env bash
# Compiles and links the trainer with nvcc for three architectures: no warning, no spill, no note of ptxas that
# it serialised something; and the table of registers for sm_90a equals dev/kernels.txt.
#   test/nvcc.sh --update   writes dev/kernels.txt from this build
set -u
cd "$(dirname "$0")/.."
passed=0 failed=0
check() {      # check NAME STATUS [DETAIL]
    if [ "$2" -eq 0 ]; then echo "ok    $1"; passed=$((passed + 1)); else echo "FAIL  $1 ${3:-}"; failed=$((failed + 1)); fi
}
if ! command -v nvcc > /dev/null; then
    echo "skip  nvcc is not installed here: nothing was compiled for a GPU"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
for arch in 90a 80 100; do
    dir=build/cuda-$arch-bf16 status=0
    make -s $dir/train_gpt2 ARCH=$arch PRECISION=bf16 > $dir.log 2>&1 || { status=1; tail -5 $dir.log; }
    check "nvcc sm_$arch compiles and links" $status
    [ $status -eq 0 ] || continue
    grep -vE 'ptxas info|bytes stack frame|^$' $dir/ptxas.txt > $dir/notes.txt
    check "nvcc sm_$arch is silent" "$([ -s $dir/notes.txt ] && echo 1 || echo 0)" "$(head -1 $dir/notes.txt)"
    check "ptxas sm_$arch has no C75xx note" "$(grep -qE 'C75[0-9][0-9]' $dir/ptxas.txt && echo 1 || echo 0)"
    dev/ptxas_table.sh $dir/ptxas.txt > $dir/kernels.txt
    spills=$(awk 'NR > 1 && $4 != 0' $dir/kernels.txt)
    check "ptxas sm_$arch spills nothing" "$([ -n "$spills" ] && echo 1 || echo 0)" "$spills"
done
if [ "${1:-}" = --update ]; then
    cp build/cuda-90a-bf16/kernels.txt dev/kernels.txt
fi
difference=$(diff dev/kernels.txt build/cuda-90a-bf16/kernels.txt)
check "dev/kernels.txt is what ptxas says" $? "$difference
      if the change is meant: test/nvcc.sh --update"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
