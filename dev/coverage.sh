#!/usr/bin/env bash
# dev/coverage.sh: which lines of llmc/ and train_gpt2.cu the tests run. Builds both precisions with gcov's
# counters, runs `make test` in each and merges: a line counts as run if any program in either build ran it,
# in any instance of a template; a line that no program compiled is not counted. Fails below 90 %.
#   dev/coverage.sh --missing    also prints the lines that nothing runs
set -u
cd "$(dirname "$0")/.."
wanted=90
missing=0
[ "${1:-}" = --missing ] && missing=1

# Unused functions are kept, as lines that do not run; none is inlined before it has its counters.
# Counters need not be exact, only zero or not, so no atomics.
extra="-O1 -fno-early-inlining -fkeep-static-functions -fkeep-inline-functions -fprofile-update=single -Wno-unused-function"
for precision in fp32 bf16; do
    find build/$precision-coverage -name '*.gcda' -delete 2> /dev/null
    make -s test COV=1 PRECISION=$precision EXTRA="$extra" || { echo "coverage: the tests fail in $precision"; exit 1; }
done

# gcov's text: "count:line:source", count - (no code), ##### or ===== (never run) or a number.
find build/*-coverage -maxdepth 1 -name '*.gcda' | while IFS= read -r counts; do
    gcov -t "$counts" 2> /dev/null
done | awk -v wanted=$wanted -v missing=$missing '
    /^ *-: *0:Source:/ {
        sub(/^ *-: *0:Source:/, "")
        while (sub(/[^\/]+\/\.\.\//, "")) {}
        file = $0 ~ /^(llmc\/[a-z0-9_]+\.(cuh|h)|train_gpt2\.cu)$/ ? $0 : ""
        next
    }
    file != "" && match($0, /^ *[^:]+: *[0-9]+:/) {
        split($0, part, ":")
        gsub(/ /, "", part[1])
        line = part[2] + 0
        if (line == 0 || part[1] == "-") next
        key = file SUBSEP line
        if (!(key in run)) { run[key] = 0; total[file]++; if (line > last[file]) last[file] = line }
        if (part[1] ~ /^[0-9]/ && !run[key]) { run[key] = 1; done[file]++ }
    }
    END {
        for (f in total) {
            all += total[f]; all_done += done[f]
            printf "%-24s %5d of %5d lines %6.1f %%\n", f, done[f], total[f], 100 * done[f] / total[f] | "sort"
        }
        close("sort")
        if (all == 0) { print "coverage: no counters were written"; exit 1 }
        printf "%-24s %5d of %5d lines %6.1f %%, wanted %d\n", "total", all_done, all, 100 * all_done / all, wanted
        for (f in total) for (line = 1; missing && line <= last[f]; line++) {
            if ((f SUBSEP line) in run && !run[f, line]) print f ":" line | "sort -t: -k1,1 -k2,2n"
        }
        close("sort -t: -k1,1 -k2,2n")
        exit !(all_done >= wanted / 100 * all)
    }'
