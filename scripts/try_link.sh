#!/usr/bin/env bash
# try_link.sh FILE COMPILE LIBRARIES GOALS, for the Makefile: are MPI and (where -lnccl is among LIBRARIES) NCCL there?
# Compiles and links a program that uses them. FILE holds the command that succeeded last, so that a command
# is tried only once, and what depends on FILE is built again after a change. Says what to type where it fails.
set -u
file="$1" compile="$2" libraries="$3" goals="$4"
[ "$compile $libraries" = "$(cat "$file" 2> /dev/null)" ] && exit 0
rm -f "$file"
mkdir -p "$(dirname "$file")"
if ! command -v "${compile%% *}" > /dev/null; then
    echo "the compiler ${compile%% *} is not found; for nvcc: PATH=\$PATH:/usr/local/cuda/bin make${goals:+ $goals}"
    exit 1
fi
nccl=""
[[ " $libraries " == *" -lnccl "* ]] && nccl=yes
{
    echo '#include <mpi.h>'
    [ -n "$nccl" ] && printf '#include <nccl.h>\nvoid* nccl = (void*)ncclGroupEnd;\n'
    echo 'int main() { return MPI_Finalize(); }'
} > "$file.cpp"
# shellcheck disable=SC2086    # lists of words
if $compile "$file.cpp" -o "$file.out" $libraries > "$file.txt" 2>&1; then
    rm -f "$file".*
    echo "$compile $libraries" > "$file"
    exit 0
fi

head -3 "$file.txt"
what=MPI
grep -q nccl "$file.txt" && what=NCCL
rm -f "$file".*
echo "$what is not found, see above. Type one of"
if [ $what = MPI ]; then
    echo "    apt install libopenmpi-dev openmpi-bin"
    echo "    make${goals:+ $goals} MPI_HOME=/dir        /dir/include/mpi.h and /dir/lib/libmpi.so; or MPICC=/dir/bin/mpicc"
else
    echo "    apt install libnccl-dev          from NVIDIA's package source, developer.nvidia.com/nccl"
    echo "    make${goals:+ $goals} NCCL_HOME=/dir       /dir/include/nccl.h and /dir/lib/libnccl.so"
fi
echo "    make${goals:+ $goals} NCCL=0               one GPU, without NCCL and MPI"
exit 1
