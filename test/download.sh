#!/usr/bin/env bash
# test/download.sh [SERVER]: scripts/download_fineweb.sh against a host of the test's own, test/http_server.c, which it
# builds where SERVER is not given; no other host is asked.
#   a fresh download, a second one, --verify; each fault of the server; what is resumed from which byte, by the server's log
#   Ctrl-C, kill -9, two at a time, a full disk, a folder that cannot be written to, words that make no sense
set -u
server=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d)
served="$work/served" log="$work/log" script="$PWD/scripts/download_fineweb.sh"
passed=0 failed=0 skipped=0
mkdir "$work/tmp" "$served"
export TMPDIR="$work/tmp"        # where the script keeps its files: so that only they are there
export FINEWEB_PAUSE_MS=20 FINEWEB_TRIES=3 FINEWEB_SHARD_MB=4
unset FINEWEB_DIR FINEWEB_URL FINEWEB_PARALLEL FINEWEB_STALL_S http_proxy HTTP_PROXY all_proxy ALL_PROXY

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
skip() { echo "skip  $1"; skipped=$((skipped + 1)); }
closing_line() {
    echo "$passed passed, $failed failed$([ $skipped -eq 0 ] || echo ", $skipped skipped")"
    [ $failed -eq 0 ]
}
if ! command -v curl > /dev/null; then skip "no curl: apt install curl"; closing_line; exit; fi
[ -n "$server" ] || { server="$work/http_server"; "${CXX:-g++}" -O1 -x c++ test/http_server.c -o "$server" || exit 1; }

# ---- what is served ------------------------------------------------------------------------
little_endian() { local v=$1; for _ in 1 2 3 4; do printf '%b' "\\x$(printf %02x $((v & 255)))"; v=$((v >> 8)); done; }
make_shard() {      # make_shard NAME TOKENS
    { little_endian 20240520; little_endian 1; little_endian "$2"; head -c 1012 /dev/zero; head -c $((2 * $2)) /dev/urandom; } > "$served/$1"
    (cd "$served" && sha256sum "$1" > "$1.sha256")
}
val=fineweb_val_000000.bin train=fineweb_train_000001.bin train2=fineweb_train_000002.bin
make_shard $val 200000            # 401,024 bytes
make_shard $train 1600000         # 3,201,024
make_shard $train2 150000         # 301,024
"$server" "$served" "$log" > "$work/port" &
server_pid=$!
trap 'kill $server_pid; rm -rf "$work"' EXIT
for _ in $(seq 500); do [ -s "$work/port" ] && break; sleep 0.01; done
host="http://127.0.0.1:$(cat "$work/port")"
: >> "$log"

# ---- helpers -------------------------------------------------------------------------------
begin() {      # begin CASE FAULTS: the folder and the address of what follows
    case_name=$1 dir="$work/$1" out="$work/$1.txt"
    mkdir -p "$dir"
    export FINEWEB_URL="$host/$2/$1"
}
download() {      # download N FLAGS...: into $dir, words into $out, exit status into $status
    local n=$1; shift
    timeout -k 5 30 "$script" "$n" "$dir" "$@" > "$out" 2>&1
    status=$?
}
requests() { grep -E "^$1 .*/$case_name/${2:-} " "$log"; }       # requests METHOD [NAME] of this case
gets() { requests GET '.*' | grep -c 'status=20'; }       # answers with a body
ranges() { requests GET "$1" | sed -E 's/.*range=([^ ]+) status=(.*)/\1:\2/' | tr '\n' ' ' | sed 's/ $//'; }
right() {      # right NAME...: they are what the server has, and nothing half-made lies beside them
    local name
    for name in "$@"; do cmp -s "$served/$name" "$dir/$name" && ! [ -e "$dir/$name.part" ] || return 1; done
}
absent() { ! [ -e "$dir/$1" ]; }
says() { grep -qE -- "$1" "$out"; check $? "$case_name: says '$1' (said: $(tail -3 "$out" | tr '\n' '|'))"; }
ends() { [ "$status" -eq "$1" ]; check $? "$case_name: exit status $1 (got $status: $(tail -3 "$out" | tr '\n' '|'))"; }
log_is() {      # log_is NAME 'RANGE:STATUS ...': the requests of a file
    local got; got=$(ranges "$1")
    [ "$got" = "$2" ]; check $? "$case_name: requests of $1 are '$2' (got '$got')"
}
prefix() { head -c "$2" "$served/$1" > "$dir/$1.part"; }        # prefix NAME BYTES: what an earlier run left
survives() {      # survives CASE FAULTS: the three files in the end all the same
    begin "$1" "$2"
    download 2
    ends 0
    right $val $train $train2; check $? "$1: the bytes are right"
}
fails() {      # fails CASE FAULTS REGEX: of the val shard, and no file is left
    begin "$1" "$2"
    download 0
    ends 1
    says "^download_fineweb: $val: .*($3)"
    [ "$(grep -c "^download_fineweb: $val" "$out")" -eq 1 ]; check $? "$1: one message of the file"
    says 'same command goes on'
    absent $val; check $? "$1: no file with the name of a whole one"
}
wait_until() { for _ in $(seq 1000); do "$@" && return; sleep 0.01; done; check 1 "$case_name: waited ten seconds for $*"; }
requested() { requests GET "$1" > /dev/null; }
larger() { [ -f "$1" ] && [ "$(wc -c < "$1")" -gt "$2" ]; }
no_downloads() { ! cat /proc/[0-9]*/cmdline 2> /dev/null | tr '\0' ' ' | grep -q "curl --fail.*$host/.*/$case_name/"; }

# ---- fresh, again, verify ------------------------------------------------------------------
survives fresh redirect,sum=right
says 'sha256 is right'
[ "$(gets)" -eq 3 ]; check $? "fresh: three answers with a body (got $(gets))"
(cd "$dir" && sha256sum --check --status SHA256SUMS && [ "$(wc -l < SHA256SUMS)" -eq 3 ]); check $? "fresh: SHA256SUMS"
lines=$(wc -l < "$log")
download 2; ends 0; says 'nothing to download'
download 1; ends 0
download 2 --verify; ends 0; says 'sha256 is that of SHA256SUMS'
[ "$(wc -l < "$log")" -eq "$lines" ]; check $? "again: the host is not even asked"
printf 'X' | dd of="$dir/$train" bs=1 seek=2000 conv=notrunc 2> /dev/null
printf 'Y' | dd of="$dir/$train" bs=1 seek=2001 conv=notrunc 2> /dev/null
download 2 --verify; ends 0; says "$train: sha256 .* deleted and fetched again"
right $val $train $train2; check $? "verify: the bytes are right again"
[ "$(gets)" -eq 4 ]; check $? "verify: fetched the one that was wrong"
rm "$dir/SHA256SUMS"
download 2 --verify; ends 0; says 'sha256 is that of the host'
[ "$(requests HEAD '.*' | grep -c status=200)" -eq 3 ] && [ "$(gets)" -eq 4 ]; check $? "verify: asks the host for sums alone"
[ "$(wc -l < "$dir/SHA256SUMS")" -eq 3 ]; check $? "verify: keeps them"

begin no-sum ok; download 0; ends 0; says 'the host tells no sha256'
right $val; check $? "no-sum: the bytes are right"
! [ -e "$dir/$train" ]; check $? "0 training shards: none"
begin by-variable ok
FINEWEB_DIR="$dir" "$script" 1 > "$out" 2>&1; status=$?; ends 0
right $val $train; check $? "FINEWEB_DIR"

# ---- faults that pass ----------------------------------------------------------------------
survives truncated truncate=100000:1,sum=right
for name in $val $train $train2; do log_is "$name" "-:200 100000:206"; done
survives dropped drop=100000:2,sum=right
log_is $train "-:200 100000:206 200000:206"
FINEWEB_STALL_S=1 survives stalled stall=2000:1,sum=right
says 'stalled for 1 s'        # curl looks at the mean of five seconds: a stall after few bytes is noticed sooner
log_is $val "-:200 2000:206"
survives redirected redirect,truncate=100000:1,sum=right
log_is $val "-:302 -:200 100000:302 100000:206"
survives error status=500:2
says 'the host answers 500 \(try 2 of 3\)'
start=$SECONDS
survives busy status=429:1,retry=1
[ $((SECONDS - start)) -ge 1 ]; check $? "busy: waits as long as Retry-After says"
survives refused status=416:1
survives chunked chunked,truncate=100000:1,sum=right
log_is $val "-:200 100000:206"
survives no-length nolength,truncate=100000:1
says 'it ends after 100000 of 401024 bytes'
log_is $val "-:200 100000:206"
survives corrupt corrupt=5000:1,sum=right
says 'sha256 .*, the host says .* fetched once more'
log_is $val "-:200 -:200"
survives cut norange,truncate=100000:1,sum=right
log_is $val "-:200 100000:200 -:200"

# The tries are counted anew after a mebibyte: 3.2 MB in three pieces with two tries.
begin gains drop=1200000
FINEWEB_TRIES=2 download 1; ends 0
log_is $train "-:200 1200000:206 2400000:206"

# ---- faults that stay ----------------------------------------------------------------------
fails always-corrupt corrupt=5000,sum=right "sha256 .*, the host says"
log_is $val "-:200 -:200"
absent $val.part; check $? "always-corrupt: deleted"
fails wrong-sum sum=wrong "the host says 0000"
log_is $val "-:200 -:200"
fails wrong-size size=wrong,sum=right "the host says 401026"
fails magic corrupt=0 "not a token shard: magic"
log_is $val "-:200 -:200"
fails version corrupt=4 "version"
fails tokens corrupt=11 "promises -"
fails page html "not a token shard"
fails longer extra=10 "401034 bytes, its header promises 401024"
fails always-error status=503 "answers 503 .try 3 of 3"
log_is $val "-:503 -:503 -:503"
fails not-there status=404 "answers 404; is $host/.* the right address"
log_is $val "-:404"
fails circle loop "redirects"
FINEWEB_STALL_S=1 FINEWEB_TRIES=2 fails always-stalled stall=0 "stalled"
fails always-cut norange,truncate=100000 "goes|ends|transfer closed|nothing from byte"
begin nobody ok
FINEWEB_URL=http://127.0.0.1:1/x download 0; ends 1; says "$val: .*[Cc]onnect"
begin one-of-three status=404
FINEWEB_URL="$host/status=404/$case_name" download 0
FINEWEB_URL="$host/ok/$case_name" download 2
rm "$dir/$train"
FINEWEB_PARALLEL=1 FINEWEB_URL="$host/status=404/$case_name" download 2; ends 1; says '1 of 3 files are not there'

# ---- what an earlier run left --------------------------------------------------------------
begin resumed sum=right; prefix $val 123457; download 0; ends 0
log_is $val "123457:206"; right $val; check $? "resumed: the bytes are right"
begin resumed-shift shift,sum=right; prefix $val 100000; download 0; ends 0
log_is $val "100000:206 -:200"; right $val; check $? "resumed-shift: a range that is another one is not taken"
begin resumed-norange norange,sum=right; prefix $val 100000; download 0; ends 0
log_is $val "100000:200 -:200"; right $val; check $? "resumed-norange: starts again"
begin resumed-416 status=416:1,sum=right; prefix $val 100000; download 0; ends 0
log_is $val "100000:416 -:200"; right $val; check $? "resumed-416: starts again"
begin complete sum=right,redirect; prefix $val 401024; download 0; ends 0
log_is $val "401024:302 401024:416"; right $val; check $? "complete: recognised"; says 'sha256 is right'
begin complete-norange sum=right,norange; prefix $val 401024; download 0; ends 0
log_is $val "401024:200"; right $val; check $? "complete-norange: recognised"
begin complete-nohead nohead; prefix $val 401024; download 0; ends 0
log_is $val "401024:416"; right $val; check $? "complete-nohead: recognised"
begin complete-wrong sum=right; prefix $val 401024
printf 'XY' | dd of="$dir/$val.part" bs=1 seek=3000 conv=notrunc 2> /dev/null
download 0; ends 0; log_is $val "401024:416 -:200"; right $val; check $? "complete-wrong: fetched again"
begin resumed-wrong sum=right; prefix $val 100000
printf 'XY' | dd of="$dir/$val.part" bs=1 seek=3000 conv=notrunc 2> /dev/null
download 0; ends 0; log_is $val "100000:206 -:200"; right $val; check $? "resumed-wrong: fetched again"
begin resumed-page sum=right; echo '<!DOCTYPE html><html>' > "$dir/$val.part"; download 0; ends 0
log_is $val "-:200"; right $val; check $? "resumed-page: starts again"
begin resumed-long sum=right; { cat "$served/$val"; echo; } > "$dir/$val.part"; download 0; ends 0
log_is $val "-:200"; right $val; check $? "resumed-long: starts again"
begin resumed-tiny sum=right; prefix $val 5; download 0; ends 0
right $val; check $? "resumed-tiny: the bytes are right"
begin plain-curl sum=right; head -c 100000 "$served/$val" > "$dir/$val"; download 0; ends 0
log_is $val "100000:206"; right $val; check $? "plain-curl: a short file is gone on with"
begin other-file sum=right; head -c 100000 /dev/zero > "$dir/$val"; download 0; ends 0
says 'magic 0'; log_is $val "-:200"; right $val; check $? "other-file: fetched again"

# ---- signals -------------------------------------------------------------------------------
begin_stalled() {      # begin_stalled CASE: three downloads that hang after 150,000 bytes, in a process group of their own
    begin "$1" "stall=150000:1,sum=right"
    set -m
    FINEWEB_STALL_S=60 "$script" 2 "$dir" > "$out" 2>&1 &
    main=$!
    set +m
    for name in $val $train $train2; do wait_until larger "$dir/$name.part" 140000; done
}
resumes() {      # what is there is kept, and the rest is fetched by the next run
    local name from=()
    wait_until no_downloads
    for name in $val $train $train2; do
        absent "$name"; check $? "$case_name: $name has no name of a whole one yet"
        from+=("$(wc -c < "$dir/$name.part")")
    done
    local start=$SECONDS
    download 2; ends 0
    [ $((SECONDS - start)) -le 20 ]; check $? "$case_name: nothing is waited for"
    log_is $val "-:200 ${from[0]}:206"
    log_is $train "-:200 ${from[1]}:206"
    right $val $train $train2; check $? "$case_name: the bytes are right"
}
for signal in INT:130 TERM:143; do
    begin_stalled "signal-${signal%:*}"
    kill "-${signal%:*}" -- -$main; wait $main 2> /dev/null; status=$?; ends "${signal#*:}"
    says 'stopped; the same command goes on'
    resumes
done
begin_stalled term-alone; kill -TERM $main; wait $main 2> /dev/null; status=$?; ends 143; resumes
begin_stalled kill-all; kill -KILL -- -$main; wait $main 2> /dev/null; resumes
rm -rf "$work"/tmp/*                     # kill -9 of everything leaves the temporary folder
begin_stalled kill-main; kill -KILL $main; wait $main 2> /dev/null; resumes

begin_stalled kill-one
kill -KILL "$(cat "$work"/tmp/*/$val.pid)"
wait_until grep -q "$val: given up" "$out"
[ -s "$dir/$val.part" ]; check $? "kill-one: what it fetched is there"
kill -TERM $main; wait $main 2> /dev/null
wait_until no_downloads

# ---- two at a time -------------------------------------------------------------------------
begin twice pause=100000:1,sum=right
"$script" 2 "$dir" > "$work/twice-1.txt" 2>&1 & first=$!
wait_until requested $val
download 2; ends 0; says 'another download .* is under way'; says 'nothing to download'
wait $first; check $? "twice: the first one is not disturbed"
[ "$(gets)" -eq 3 ]; check $? "twice: every file is fetched once (got $(gets))"
right $val $train $train2; check $? "twice: the bytes are right"

# ---- progress on a terminal ----------------------------------------------------------------
if command -v script > /dev/null; then
    begin terminal pause=100000:1,sum=right
    script -qec "$script 2 $dir" /dev/null < /dev/null > "$out" 2>&1; status=$?; ends 0
    says "$train  .* MB of 3\.2  [0-9]+%"
    says $'\033\\[4A'
    right $val $train $train2; check $? "terminal: the bytes are right"
else
    skip "terminal: no program script (bsdutils)"
fi
! grep -q $'\033' "$work/fresh.txt"; check $? "no escape sequences but on a terminal"

# ---- disk and folders ----------------------------------------------------------------------
begin huge ok; FINEWEB_SHARD_MB=1000000 download 2; ends 1
says 'MB free, the files that are missing want 3000000'
[ "$(gets)" -eq 0 ]; check $? "huge: nothing is asked for"
isolated=""
for flags in -m -rm; do
    unshare $flags mount -t tmpfs -o size=1m tmpfs "$work/tmp" 2> /dev/null && isolated=$flags && break
done
if [ -n "$isolated" ]; then
    begin full sum=right
    unshare $isolated bash -s "$script" "$dir" "$train" "$served" > "$out" 2>&1 <<'END'
        mount -t tmpfs -o size=2m tmpfs "$2" || exit 9
        FINEWEB_SHARD_MB=1 "$1" 1 "$2" < /dev/null
        echo "first: $?, $(ls "$2" | tr '\n' ' ')"
        mount -o remount,size=20m "$2"
        "$1" 1 "$2" < /dev/null
        echo "second: $?, $(cmp "$4/$3" "$2/$3" && echo right)"
END
    says "^download_fineweb: $train: .*cannot be written; its disk has 0 MB free"
    says "^first: 1, .*$train.part"
    says '^second: 0, right'
    requests GET $train | grep -qE 'range=[1-9][0-9]+ status=206'; check $? "full: goes on when there is room"
else
    skip "a full disk: unshare may not mount here"
fi
cannot() {      # cannot REGEX COMMAND...: ends with 1 and these words, at once
    local words=$1; shift
    timeout -k 5 30 "$@" > "$out" 2>&1 < /dev/null; status=$?
    ends 1; says "$words"
}
begin folders ok
cannot 'Not a directory|File exists' "$script" 1 "$served/$val/folder"
cannot 'is a folder; move it away' bash -c "mkdir '$dir/$val' && exec '$script' 0 '$dir'"
mkdir "$work/closed"; chmod 555 "$work/closed"
if [ "$(id -u)" -ne 0 ]; then
    cannot 'cannot be written to .Permission denied' "$script" 1 "$work/closed"
elif command -v setpriv > /dev/null; then
    cp "$script" "$work/copy.sh"; chmod 755 "$work" "$work/copy.sh"
    nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups env -C / bash "$work/copy.sh")
    cannot 'cannot be written to .Permission denied' "${nobody[@]}" 1 "$work/closed"
    cannot 'cannot be made .Permission denied' "${nobody[@]}" 1 "$work/closed/data"
else
    skip "a folder that cannot be written to: root writes to all, and setpriv is not here"
fi

# ---- words ---------------------------------------------------------------------------------
begin words ok
for n in -1 104 x 1.5 99999999999999999999 1e1; do cannot 'whole number from 0 to 103|no flag' "$script" $n "$dir"; done
cannot 'no flag is called --all' "$script" --all
cannot 'too many words' "$script" 1 "$dir" "$dir"
cannot 'FINEWEB_PARALLEL must be' env FINEWEB_PARALLEL=0 "$script" 1 "$dir"
"$script" --help > "$out"; status=$?; ends 0; says 'FINEWEB_URL'
mkdir "$work/bin"
for tool in bash env sed dirname realpath mkdir; do ln -s "$(command -v $tool)" "$work/bin/"; done
cannot 'curl is not here: apt install curl' env PATH="$work/bin" bash "$script" 1 "$dir"
[ "$(requests '.*' '.*' | wc -l)" -eq 0 ]; check $? "words: the host is not asked"

# ---- nothing is left -----------------------------------------------------------------------
case_name='.*'
wait_until no_downloads
left=$(ls -A "$work/tmp"); [ -z "$left" ]; check $? "no temporary file is left (left: $left)"
closing_line
