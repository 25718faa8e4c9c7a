#!/usr/bin/env bash
# test/compare_logs.sh PROGRAM: build/compare_logs on the logs of test/data/logs, on logs made here, and its page.
# In test/data/logs: record5.txt and record11.txt have the val losses of speedrun records 5 and 11 at some steps, in the
# form of their logs (the second with CRLF and a step twice); seeds/ has invented runs in the form of our own logs.
set -u
program=$(realpath "$1")
cd "$(dirname "$0")/data/logs" || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0
export LC_ALL=C

check() {      # check NAME STATUS: 0 passes. No $(...) in NAME where STATUS is $?: that would be its status
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $1"; failed=$((failed + 1)); fi
}
compare() { "$program" "$@" > "$work/out.txt" 2> "$work/err.txt"; }
line() { echo "step:$1/${4:-10} val_loss:$2 train_time:${3}ms step_avg:nanms"; }      # line STEP LOSS MS [STEPS]
has() { grep -qE -- "$2" "$work/out.txt"; check "$1: $2" $?; }      # has NAME REGEX
is() { [ "$2" = "$3" ]; check "$1: $3 wanted, got $2" $?; }      # is NAME GOT WANTED
refuses() {      # refuses NAME REGEX WORDS...: status 1, nothing printed, one message
    local name="$1" wanted="$2"; shift 2
    compare "$@"; is "$name: status" $? 1
    is "$name: prints no table" "$(wc -c < "$work/out.txt")" 0
    words=$(tr '\n' ' ' < "$work/err.txt")
    grep -qE -- "^compare_logs: .*$wanted" <<< "$words"; check "$name: $wanted; got $words" $?
}
logs=(--tokens-per-step record5.txt=524288 --tokens-per-step 'record 11=524288' record5.txt
      --group 'record 11' record11.txt --group 'seeds 1-3' seeds/1 seeds/2/log.txt seeds/3)

# ---- the tables ----------------------------------------------------------------------------
compare --html "$work/page.html" "${logs[@]}"; check "three logs" $?
[ ! -s "$work/err.txt" ]; check "no message" $?
why=$(sed '$d' "$work/out.txt" | diff - expected.txt); check "the tables: $why" $?
is "the page's name is the last line" "$(tail -1 "$work/out.txt")" "$work/page.html"

# Nothing before or between the lines matters, whatever its size: 200 kB and more of it, a line of 300 kB, NUL bytes.
{ for ((i = 0; i < 4000; i++)); do echo "    step:$i/9 val_loss:9.0 train_time:1ms, the line $i of a program"; done
  head -c 300000 /dev/zero | tr '\0' x; printf '\nnul \0 step:1/2 val_loss:1\n'; cat record5.txt; } > "$work/long.txt"
compare record5.txt; mv "$work/out.txt" "$work/short.out"
compare "$work/long.txt"
cmp -s <(sed "s|  [^ ]*$||" "$work/short.out") <(sed "s|  [^ ]*$||" "$work/out.txt"); check "a long head changes nothing" $?

# ---- small logs, by hand -------------------------------------------------------------------
{ line 0 11 0; line 2 5 2000; line 4 4 4000; line 8 3 8000; line 10 3.2 11000; } > "$work/a.txt"
{ line 0 11 0; line 5 3.5 5000; line 10 2.5 10000; } > "$work/b.txt"
compare --target 3.5 "$work/a.txt" "$work/b.txt"
has "steps and time to the target, at once and on a line" '^  A +6 +- +6\.0 s +- +1\.000 +1 of 1$'
has "the target at a validation" '^  B +5 +- +5\.0 s +- +0\.833 +1 of 1$'
has "the other's first validation is at step 5" '^ +4 +4\.0000$'
has "before the second validation there is no line" '^ +2 +5\.0000$'
has "by step" '^ +5 +~3\.7500 +3\.5000 +B by 0\.2500$'
has "by step, the other way round" '^ +8 +3\.0000 +~2\.9000 +B by 0\.1000$'
has "by time" '^ +6 +3\.5000 +3\.3000 +B by 0\.2000$'
has "alone at the end" '^ +11 +3\.2000$'
has "who is ahead where, by step" '^  Ahead: B at 5 to 10\.$'
compare --target 2 "$work/a.txt"
has "not reached" '^  A +- +- +- +- +- +0 of 1$'
compare --target 2.5 "$work/b.txt"
has "reached in the last validation" '^  A +10 +- +10\.0 s .* 1 of 1$'
compare --target 12 "$work/b.txt"
has "reached before training" '^  A +0 +- +0\.0 s '
{ line 0 11 0; line 5 3.50001 5000; line 10 2.4 10000; } > "$work/c.txt"
compare "$work/b.txt" "$work/c.txt"
has "even" '^ +5 +3\.5000 +3\.5000 +even$'
has "who is ahead where, with a tie" '^  Ahead: even at 5, B at 10\.$'
compare --group g "$work/a.txt" "$work/b.txt"
has "a mean" '^ +10 +2\.8500$'
is "means are where all runs have validations" "$(sed -n '/by step/,/^$/p' "$work/out.txt" | grep -cE '^ +[0-9]')" 2
has "the mean of times" '^  A +2 +10 +- +2\.8500 +10\.5 s +1050\.00  g$'
sed 's/ms step/s step/; s/000s/s/' "$work/a.txt" > "$work/seconds.txt"
compare "$work/seconds.txt"; has "a time in seconds" ' 11\.0 s '
{ cat "$work/a.txt"; line 4 3.9 4000; line 10 3.1 10500; } > "$work/again.txt"
compare "$work/again.txt"
has "a run that was taken up again" 'A: validations made again: 3; the later count'
has "what it had is gone" '^ +4 +3\.9000$'
grep -qE '^ +8 ' <(sed -n '/by step/,/^$/p' "$work/out.txt"); check "so is what came after it" $((! $?))
{ line 0 11 0 40; line 5 3 5000 40; } > "$work/part.txt"
compare "$work/part.txt"; has "a run that is not finished" '^  A     1  5 of 40 '
for ((i = 0; i <= 1000; i++)); do line $i $((2000 - i)) $i 1000; done > "$work/many.txt"
compare "$work/many.txt"
n=$(sed -n '/by step/,/^$/p' "$work/out.txt" | grep -cE '^ +[0-9]+ +[0-9.]+$')
[ "$n" -ge 20 ] && [ "$n" -le 30 ]; check "1001 validations are some 25 rows: $n" $?

# ---- tokens per step -----------------------------------------------------------------------
compare seeds/1; has "from the start table" '^  A +1 +2225 +262144 '
grep -v batch-tokens seeds/1/log.txt > "$work/result.txt"
compare "$work/result.txt"; has "from RESULT" '^  A +1 +2225 +262144 '
grep -v ^RESULT seeds/1/log.txt > "$work/killed.txt"
compare "$work/killed.txt"; has "of a run that was killed" '^  A +1 +2225 +262144 '
compare record5.txt; has "not known" '^  A +1 +5100 +- '
compare record5.txt --group x record11.txt --tokens-per-step x=1000000; has "by the group's name" '^  B +2944 +2\.944 B '

# ---- the t-test ----------------------------------------------------------------------------
# sample N MEAN D: N one-validation logs in $work/s, half of them D above and half D below the mean, an odd one at it
sample() {
    rm -rf "$work/s"; mkdir "$work/s"
    awk -v n="$1" -v mean="$2" -v d="$3" -v dir="$work/s" 'BEGIN {
        for (i = 0; i < n; i++) {
            x = mean + (n % 2 && i == n - 1 ? 0 : i % 2 ? -d : d)
            printf "step:9/9 val_loss:%.15f train_time:%dms\n", x, i > (dir "/" i)
        } }'
}
field() { sed -n '/^t-test/,/^$/p' "$work/out.txt" | awk -v f="$1" '$1 == "A" { print $f }'; }
# Quantiles by the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), which agree with
# printed tables. p comes with four digits, so that half a digit of the last place is 5e-5 of 0.01; 1e-6 in t is less.
df=(1 2 3 5 10 30 60 120)
q_05=(6.313752 2.919986 2.353363 2.015048 1.812461 1.697261 1.670649 1.657651)
q_01=(31.820516 6.964557 4.540703 3.364930 2.763769 2.457262 2.390119 2.357825)
q_001=(318.308839 22.327125 10.214532 5.893430 4.143700 3.385185 3.231709 3.159539)
for i in "${!df[@]}"; do
    n=$((df[i] + 1))
    for p in 05 01 001; do
        eval "t=\${q_$p[i]}"
        # sd = d sqrt(n/(n-1)), or d where n is odd
        mean=$(awk -v n=$n -v t="$t" 'BEGIN { printf "%.15f", 3.28 - t * 0.001 * sqrt(n % 2 ? 1 : n / (n - 1)) / sqrt(n) }')
        sample $n "$mean" 0.001
        compare --group g "$work"/s/*
        is "t of $n runs" "$(field 5)" "$(printf -- '-%.3f' "$t")"
        got=$(field 6)
        awk -v got="$got" -v p="0.$p" 'BEGIN { exit !(got >= p * 0.9999 && got <= p * 1.0001) }'
        check "p of t = -$t with ${df[i]} degrees of freedom: $got, 0.$p wanted" $?
    done
done
sample 2 3.281 0.001; compare --group g "$work"/s/*      # one degree of freedom: p = 1/2 + atan(1)/pi
is "above the target" "$(field 5) $(field 6) $(field 7)" "1.000 0.75 -"
has "above the target" 'A: its mean is not below the target'
sample 3 3.279 0.0017320508; compare --group g "$work"/s/*      # two: p = 1/2 - t / (2 sqrt(2 + t^2)) at t = 1
is "two degrees of freedom" "$(field 5) $(field 6)" "-1.000 0.2113"
is "the mean of three" "$(field 3) $(field 4)" "3.27900 0.00173"

# Runs needed, from two runs with the wanted mean and sd (their difference over sqrt 2).
while read -r sd wanted; do
    read -r -a runs <<< "$wanted"
    i=0
    for delta in 0.0005 0.001 0.0015 0.002 0.003; do
        sample 2 "$(awk -v d=$delta 'BEGIN { print 3.28 - d }')" "$(awk -v sd="$sd" 'BEGIN { printf "%.15f", sd / sqrt(2) }')"
        compare --group g "$work"/s/*
        is "runs needed at sd $sd, $delta below" "$(field 7)" "${runs[i++]}"
    done
done << 'END'
0.0010 25 9 6 5 4
0.0013 40 13 8 6 4
0.0019 82 23 12 9 6
END
sample 2 3.2799999 0.001; compare --group g "$work"/s/*; has "too many runs" ' > 1048576$'
sample 10 3.275 0; compare --group g "$work"/s/*
is "equal losses" "$(field 4) $(field 5) $(field 6) $(field 7)" "0.00000 - - -"
has "equal losses" 'A: no test: all last losses are equal'
cp "$work/s/0" "$work/s/copy"; compare --group g "$work"/s/*; has "a copy of a log" 'A: no test: .*/copy repeats .*/0; vary seed or data'
sed 's/train_time:.*ms step/train_time:7ms step/' seeds/1/log.txt > "$work/same_seed.txt"
compare --group g seeds/2 seeds/1 "$work/same_seed.txt"; has "the same seed" "A: no test: $work/same_seed.txt repeats seeds/1;"
compare record5.txt record11.txt; grep -q t-test "$work/out.txt"; check "no test without a group" $((! $?))

# ---- bad input -----------------------------------------------------------------------------
bad() { { line 0 11 0; printf '%b\n' "$3"; } > "$work/bad.txt"; refuses "$1" "bad\\.txt:2: $2" record5.txt "$work/bad.txt"; }      # bad NAME REGEX LINE
bad "NaN" "val_loss is 'nan'; a finite number is wanted" 'step:5/10 val_loss:nan train_time:5ms step_avg:1ms'
bad "infinity" "val_loss is 'inf'; a finite number" 'step:5/10 val_loss:inf train_time:5ms'
bad "a negative loss" "val_loss is '-1'; a finite" 'step:5/10 val_loss:-1 train_time:5ms'
bad "letters in a number" "val_loss is '3\\.2x'; a finite" 'step:5/10 val_loss:3.2x train_time:5ms'
bad "a time without unit" "train_time is '5'; a finite number of ms or s is wanted" 'step:5/10 val_loss:3.2 train_time:5'
bad "a time that is none" "train_time is 'nanms'; a finite" 'step:5/10 val_loss:3.2 train_time:nanms'
bad "a line cut off" "'step:5/10 val_loss:3\\.2' is not +step:S/N val_loss:V train_time:Tms; was it cut off" 'step:5/10 val_loss:3.2\r'
bad "no step" "'step:5 val_loss:3\\.2 train_time:5ms' is not" 'step:5 val_loss:3.2 train_time:5ms'
bad "a step of 20 digits" "'step:12345678901234567890/10 .*' is not" 'step:12345678901234567890/10 val_loss:3.2 train_time:5ms'
{ line 0 11 5; line 1 10 4; } > "$work/bad.txt"
refuses "the clock goes back" 'bad\.txt:2: train_time 0\.004 s at step 1, after 0\.005 s: the clock went back' "$work/bad.txt"
echo "step:1/10 train_loss:3.2 train_time:5ms" > "$work/bad.txt"
refuses "no validation" 'bad\.txt: no line `step:S/N val_loss:V train_time:Tms` in 1 lines' "$work/bad.txt"
head -c 100000 "$program" > "$work/bad.txt"; refuses "junk" 'bad\.txt: no line' "$work/bad.txt"
: > "$work/bad.txt"; refuses "an empty file" 'bad\.txt: no line .* in 0 lines' "$work/bad.txt"
refuses "no such file" 'no_such\.txt: No such file' no_such.txt
refuses "a directory without log.txt" 'seeds/log\.txt: No such file' seeds
refuses "no log" 'no log to compare +usage: compare_logs'
refuses "no such flag" 'no flag --groups; there are --target, --html, --tokens-per-step and --group' --groups
refuses "no value" '--target wants a value' record5.txt --target
refuses "a bad target" "--target wants a number above 0, got '3,28'" --target 3,28 record5.txt
refuses "an empty group" '--group a has no log' --group a --group b record5.txt
refuses "an empty group at the end" '--group b has no log' record5.txt --group b
refuses "too many" 'more than 8 logs and groups' record{5,11,5,11,5,11,5,11,5}.txt
refuses "a group of two recipes" 'group g: record5\.txt ends at step 5100 and record11\.txt at 3000' --group g record5.txt record11.txt
sed 's/262144 tokens/131072 tokens/; /^RESULT/d' seeds/2/log.txt > "$work/half.txt"
refuses "a group of two batch sizes" 'group g: seeds/1 takes 262144 tokens per step and .*half\.txt 131072' --group g seeds/1 "$work/half.txt"
refuses "tokens that are none" "--tokens-per-step wants NAME=N, got 'record5\\.txt=many'" record5.txt --tokens-per-step record5.txt=many
refuses "tokens of nothing" '--tokens-per-step record6\.txt=5: no log or group has this name' record5.txt --tokens-per-step record6.txt=5
cp record5.txt "$work/precious.txt"
refuses "a log where the page's name belongs" '--html wants the name of the page to write, NAME\.html' --html "$work/precious.txt" record11.txt
cmp -s record5.txt "$work/precious.txt"; check "the log outlives that" $?
"$program" --html "$work/no/page.html" record5.txt > /dev/null 2> "$work/err.txt"; is "nowhere to write: status" $? 1
grep -q '^compare_logs: .*no/page.html: cannot be created: No such file' "$work/err.txt"; check "nowhere to write" $?

# ---- the page ------------------------------------------------------------------------------
well_formed() {      # every tag is closed, in order
    awk 'BEGIN { RS = "<" }
         NR == 1 || /^!/ { next }
         { tag = $0; if (!sub(/>.*/, "", tag)) { print "no end: " tag; bad = 1; exit } }
         tag ~ /\/$/ { next }
         { name = tag; sub(/[ \n].*/, "", name) }
         name ~ /^\// { if (open[depth--] != substr(name, 2)) { print "out of order: " name; bad = 1; exit } next }
         { open[++depth] = name }
         END { if (depth && !bad) print "left open: " open[depth]; exit bad || depth }' "$1"
}
page="$work/page.html"
why=$(well_formed "$page"); check "every tag is closed $why" $?
for damage in 's|</g>||' 's|</td>|</th>|' 's|</html>||' 's|<h1>|<h1|'; do
    sed "0,/</$damage" "$page" > "$work/damaged.html"; sed -i "$damage" "$work/damaged.html"
    well_formed "$work/damaged.html" > /dev/null; check "the check finds $damage" $((! $?))
done
if command -v xmllint > /dev/null; then
    why=$(sed 1d "$page" | xmllint --noout - 2>&1); check "xmllint: $why" $?
else
    skipped=$((skipped + 1)); echo "skip  no xmllint here"
fi
grep -qiE 'http|<script|src=|@import|url\([^#]' "$page"; check "the page needs nothing from elsewhere" $((! $?))
grep -qiE '(nan|inf)["LM ,<]' "$page"; check "no coordinate is NaN" $((! $?))
is "panels" "$(grep -c '<svg ' "$page")" 4
is "curves of groups" "$(grep -c 'class="mean c' "$page")" 12
is "curves of runs" "$(grep -c 'class="run c2"' "$page")" 12
for text in 'tokens (billions)' 'training time (s)' '>4963<' '>2.602 B<' '0.04369' 'seeds 1-3: 3.2787, mean of 3 runs' 'Runs for p &lt; 0.01'; do
    grep -qF -- "$text" "$page"; check "the page has $text" $?
done

# Coordinates: x from 58 to 572, y from 332 to 12; losses from 2 to 3 and 0.04 more on either side.
{ line 0 4 0; line 5 3 5000; line 10 2 10000; } > "$work/a&<b>.txt"
compare --target 2.5 --html "$work/small.html" "$work/a&<b>.txt"; check "a small page" $?
grep -qF 'class="mean c0" d="M58.0 -272.4L315.0 23.9L572.0 320.1"' "$work/small.html"; check "the curve's coordinates" $?
grep -qF 'class="target" d="M58 172.0H572"' "$work/small.html"; check "the target's coordinates" $?
# The zoom begins at the loss after four fifths, 2.4 at step 8; the target is near and so inside: losses from 1.98 to 2.52.
grep -qF 'class="mean c0" d="M-1998.0 -865.0L-713.0 -272.4L572.0 320.1"' "$work/small.html"; check "the zoom's coordinates" $?
grep -qF 'a&amp;&lt;b&gt;.txt' "$work/small.html" && well_formed "$work/small.html" > /dev/null; check "names are escaped" $?
odd=$(printf 'tab\tescape\033byte\377 \303\251.txt')
cp "$work/b.txt" "$work/$odd"
compare --html "$work/odd.html" "$work/$odd"; has "letters that a terminal would obey" '/tab\?escape\?byte\? '$'\303\251''\.txt$'
grep -qF "/tab?escape?byte? $(printf '\303\251').txt" "$work/odd.html"; check "and that a page may not have" $?
{ line 0 4 0; } > "$work/start.txt"
compare --html "$work/start.html" "$work/start.txt"; check "a log that only began" $?
why=$(well_formed "$work/start.html"); check "its page is closed $why" $?
grep -qiE '(nan|inf)["LM ,<]' "$work/start.html"; check "its page has no NaN" $((! $?))

# A browser draws it: nothing lost, no labels over each other, nothing wider than the window, dark where that is wanted.
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
render() {      # render FLAGS... FILE: its DOM
    HOME="$work" timeout 120 "$chromium" --headless --no-sandbox --disable-gpu --user-data-dir="$work/profile" --dump-dom "$@" 2> "$work/err.txt"
}
echo '<p>probe</p>' > "$work/probe.html"      # one in a box of its own may not read $work
if [ -z "$chromium" ]; then
    skipped=$((skipped + 1)); echo "skip  no chromium here: the page is not drawn"
elif ! render "file://$work/probe.html" | grep -q '<p>probe'; then
    skipped=$((skipped + 1)); echo "skip  $chromium does not open a file of $work: the page is not drawn"
else
    cat > "$work/measure.txt" << 'END'
<script>
let hits = 0, light = getComputedStyle(document.body).backgroundColor;
for (const svg of document.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) hits++; }));
    const s = svg.getBoundingClientRect();
    for (const b of boxes) if (b.left < s.left || b.right > s.right || b.top < s.top || b.bottom > s.bottom) hits++;
}
const wide = document.documentElement.scrollWidth > innerWidth;
document.title = `MEASURED ${innerWidth} ${hits} ${wide} ${light} ${document.querySelectorAll("svg path").length}`;
</script>
END
    compare --html "$work/crowd.html" record5.txt record5.txt record5.txt record11.txt seeds/1 seeds/2 seeds/3; check "seven logs" $?
    while read -r name width scheme colour; do
        sed "/<\/main>/r $work/measure.txt" "$work/$name.html" > "$work/measured.html"
        render --window-size="$width,1600" --blink-settings=preferredColorScheme="$scheme" "file://$work/measured.html" > "$work/dom.txt"
        check "chromium draws $name.html" $?
        is "$name.html at $width: labels apart, no wider than the window, its colour, all curves" "$(grep -o 'MEASURED [^<]*' "$work/dom.txt" | head -1)" \
           "MEASURED $width 0 false $colour $(grep -o '<path' "$work/$name.html" | wc -l)"
    done << 'END'
crowd 600 1 rgb(255, 255, 255)
page 1200 0 rgb(22, 24, 27)
END
    for text in 'Validation loss by tokens, the last stretch (dashed: 3.28)' '>4963<' 'val loss by training time'; do
        grep -qF -- "$text" "$work/dom.txt"; check "chromium shows $text" $?
    done
    grep -qiE 'parsererror|error on line' "$work/dom.txt"; check "chromium finds no error" $((! $?))
fi

if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
