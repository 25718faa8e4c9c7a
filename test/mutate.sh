#!/usr/bin/env bash
# test/mutate.sh [WORD]: breaks the code on purpose, one line of mutations.txt at a time (with WORD, the lines
# that contain it), in a copy of the tree, and expects the tests named there to turn red. Tests that stay
# green, scripts that change nothing and copies that do not compile count as failures.
set -u
cd "$(dirname "$0")/.."
word="${1:-}" passed=0 failed=0
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r Makefile train_gpt2.cu llmc scripts test dev "$copy"
cd "$copy" || exit 1
read -r -a mpi <<< "$(${MPICC:-mpicc} -show | tr ' ' '\n' | grep -E '^-[IDLlW]' | tr '\n' ' ')"
flags=(-std=c++17 -O1 -march=native -fno-math-errno -w -Illmc/host -I. -DWITH_NCCL -DOMPI_SKIP_MPICXX "${mpi[@]}")
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mkdir objects
${CXX:-g++} -O1 -w -I. -x c++ dev/text_to_shards.c -o text_to_shards || exit 1      # test/resume.sh wants it beside the trainer
for part in llmc/host/*.cpp; do
    ${CXX:-g++} "${flags[@]}" -O2 -c "$part" -o "objects/$(basename "$part" .cpp).o" || exit 1
done

# build TEST: makes ./mutant; run TEST: runs it.
build() {
    local kind=${1%%:*} name=${1#*:} precision=FP32 source=test/test_golden.cu
    [ "$kind" = kernels16 ] && precision=BF16
    [[ "$kind" = zero || "$kind" = model ]] && source=test/test_$kind.cu
    [ "$kind" = plain ] && source=test/test_$name.c
    [[ "$kind" = services || "$kind" = loader || "$kind" = checkpoint ]] && source=test/test_$kind.c
    [ "$kind" = logs ] && source=dev/compare_logs.c
    [ "$kind" = resume ] && source=train_gpt2.cu
    if [[ "$kind" = kernels* ]]; then
        source=mutant.cu
        printf '#include "llmc/device.cuh"\n#include "test/test.h"\n#include "test/oracle.h"\n#include "test/cases_%s.h"\n' \
            "$name" > $source
        printf 'int main(int c, char** v) {\n    test_init(c, v);\n    if (test_group("%s")) test_%s();\n' "$name" "$name" >> $source
        printf '    return test_summary();\n}\n' >> $source
    fi
    ${CXX:-g++} "${flags[@]}" -DPRECISION_$precision -x c++ $source -x none objects/*.o -ldnnl -lgomp -lz -lpthread "${mpi[@]}" -o mutant
}
run() {
    local kind=${1%%:*} name=${1#*:}
    case $kind in
        golden) timeout 300 ./mutant "test/golden/$name" ;;
        zero) HOST_STREAMS=lazy HOST_SCHED=3 HOST_THREADS=1 timeout 300 mpirun -q --oversubscribe -np 2 \
                ./mutant "$name" < /dev/null ;;    # mpirun would read the list of mutations
        logs) timeout 300 test/compare_logs.sh ./mutant < /dev/null ;;
        resume) timeout 300 test/resume.sh ./mutant short < /dev/null ;;
        services | loader | model | checkpoint) timeout 300 ./mutant "$name" ;;
        *) timeout 300 ./mutant ;;
    esac
}
verdict() {      # verdict ok|FAIL TEXT
    echo "$1  $2"
    if [ "$1" = FAIL ]; then failed=$((failed + 1)); else passed=$((passed + 1)); fi
}

declare -A known                       # tests that are green without a mutation
title=""
while IFS= read -r line; do
    case "$line" in
        "#"*) title="${line#\# }"; continue ;;
        "") title=""; continue ;;
    esac
    [[ -n "$word" && "$line$title" != *"$word"* ]] && continue
    file=${line%% | *} rest=${line#* | }
    tests=${rest%% | *} script=${rest#* | }
    if [ -z "${known[$tests]:-}" ]; then
        if build "$tests" > build.txt 2>&1 && run "$tests" > run.txt 2>&1; then
            known[$tests]=green
        else
            known[$tests]=red
            grep -hE "FAIL|error" build.txt run.txt | head -5
        fi
    fi
    if [ "${known[$tests]}" = red ]; then
        verdict FAIL "$file: $title: $tests fails without the mutation"
        continue
    fi
    cp "$file" unbroken
    sed -i "$script" "$file"
    if cmp -s "$file" unbroken; then
        verdict FAIL "$file: $title: the script changes nothing"
    elif ! build "$tests" > build.txt 2>&1; then
        verdict FAIL "$file: $title: does not compile: $(grep -m1 error build.txt)"
    elif run "$tests" > run.txt 2>&1; then
        verdict FAIL "$file: $title: $tests stays green"
    else
        verdict "ok  " "$file: $title"
    fi
    cp unbroken "$file"
done < <(cat test/mutations.txt)
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
