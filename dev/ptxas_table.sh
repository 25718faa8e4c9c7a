#!/usr/bin/env bash
# dev/ptxas_table.sh PTXAS-OUTPUT: one line per kernel from the text of `nvcc -Xptxas -v`, sorted by name:
# registers, static shared memory in bytes, stack and spills in bytes, name.
set -eu
c++filt < "$1" | awk '
    /Compiling entry function/ { name = $0; sub(/.*Compiling entry function \047/, "", name); sub(/\047 for \047sm_.*/, "", name)
                                 sub(/^void /, "", name); if (match(name, />\(/)) name = substr(name, 1, RSTART); else sub(/\(.*$/, "", name) }
    /bytes stack frame/        { stack = $1; stores = $5; loads = $9 }
    /Used [0-9]+ registers/    { smem = 0
                                 for (i = 1; i <= NF; i++) { if ($i == "registers,") regs = $(i - 1); if ($i ~ /^smem/) smem = $(i - 2) }
                                 printf "%5d %7d %6d %6d  %s\n", regs, smem, stack, stores + loads, name }' |
    LC_ALL=C sort -k5 | { echo " regs    smem  stack spills  kernel"; cat; }
