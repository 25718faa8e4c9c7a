#!/usr/bin/env bash
# Compiles and links the trainer with nvcc for three architectures: no warning, no spill, no note of ptxas that
# it serialised something; with NCCL and MPI, and with NCCL=0 without; and the table of registers for sm_90a equals
# dev/kernels.txt.
#   test/nvcc.sh --update   writes dev/kernels.txt from this build
set -u
cd "$(dirname "$0")/.." || exit 1
PATH="$PATH:/usr/local/cuda/bin"
passed=0 failed=0
check() {      # check NAME STATUS [DETAIL]
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $1 ${3:-}"; failed=$((failed + 1)); fi
}
if ! command -v nvcc > /dev/null; then
    echo "skip  nvcc is not installed here: nothing was compiled for a GPU"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
compile() {      # compile DIR FLAG...: the trainer; what make says into DIR/make.txt, its status into DIR/status
    local dir="$1"; shift
    mkdir -p "$dir"
    make -s "$dir/train_gpt2" PRECISION=bf16 "$@" > "$dir/make.txt" 2>&1
    echo $? > "$dir/status"
}
# Two at a time: each keeps one core busy.
compile build/cuda-90a-bf16 ARCH=90a & compile build/cuda-80-bf16 ARCH=80 & wait
compile build/cuda-100-bf16 ARCH=100 & compile build/cuda-90a-bf16-alone NCCL=0 & wait
for arch in 90a 80 100; do
    dir=build/cuda-$arch-bf16 failed_before=$failed
    if [ "$(cat $dir/status)" -ne 0 ]; then
        check "nvcc sm_$arch does not compile and link" 1 "$(tail -5 $dir/make.txt)"
        continue
    fi
    check "nvcc sm_$arch compiles and links" 0
    grep -vE 'ptxas info|bytes stack frame|^$' $dir/ptxas.txt > $dir/notes.txt
    check "nvcc sm_$arch is not silent:" "$([ -s $dir/notes.txt ]; echo $((! $?)))" "$(head -1 $dir/notes.txt)"
    check "ptxas sm_$arch serialised something:" "$(grep -qE 'C75[0-9][0-9]' $dir/ptxas.txt; echo $((! $?)))" \
          "$(grep -E 'C75[0-9][0-9]' $dir/ptxas.txt | head -1)"
    dev/ptxas_table.sh $dir/ptxas.txt > $dir/kernels.txt
    kernels=$(($(wc -l < $dir/kernels.txt) - 1))
    [ $kernels -gt 0 ]; check "ptxas sm_$arch names no kernel" $?
    spills=$(awk 'NR > 1 && $4 != 0' $dir/kernels.txt)
    [ -z "$spills" ]; check "ptxas sm_$arch spills:" $? "$spills"
    libraries=$(readelf -d $dir/train_gpt2 | grep NEEDED)
    [[ "$libraries" == *libnccl* ]]; check "sm_$arch is linked with NCCL" $?
    [[ "$libraries" == *libmpi* ]]; check "sm_$arch is linked with MPI" $?
    echo "nvcc sm_$arch: $kernels kernels, $((failed - failed_before)) complaints"
done
dir=build/cuda-90a-bf16-alone
check "nvcc with NCCL=0" "$(cat $dir/status)" "$(tail -5 $dir/make.txt)"
! readelf -d $dir/train_gpt2 2>&1 | grep -E 'libnccl|libmpi'; check "NCCL=0 links neither NCCL nor MPI" $?
if [ "${1:-}" = --update ] && [ -s build/cuda-90a-bf16/kernels.txt ]; then
    version=$(nvcc --version | sed -nE 's/.*release ([0-9.]+).*/\1/p')
    { echo "# nvcc $version, sm_90a, bf16; written by test/nvcc.sh --update"; cat build/cuda-90a-bf16/kernels.txt; } > dev/kernels.txt
fi
# Another nvcc allocates registers otherwise: the table is compared with the version that made it.
made_by=$(sed -nE '1s/^# nvcc ([0-9.]+),.*/\1/p' dev/kernels.txt 2> /dev/null)
if [ -n "$made_by" ] && ! nvcc --version | grep -q "release $made_by,"; then
    echo "skip  dev/kernels.txt is of nvcc $made_by, here is $(nvcc --version | sed -nE 's/.*release ([0-9.]+).*/\1/p')"
    echo "$passed passed, $failed failed, 1 skipped"
else
    difference=$(diff <(grep -v '^#' dev/kernels.txt) build/cuda-90a-bf16/kernels.txt)
    check "dev/kernels.txt is not what ptxas says:" $? "$difference
      if the change is meant: test/nvcc.sh --update"
    echo "$passed passed, $failed failed"
fi
[ $failed -eq 0 ]
