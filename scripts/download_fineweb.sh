#!/usr/bin/env bash
# Downloads FineWeb in GPT-2 tokens: the validation shard and N training shards (0 to 103; 9 if not said) of
# 100 million tokens, 200 MB each, from Hugging Face's kjj0/fineweb10B-gpt2.
#
#   ./scripts/download_fineweb.sh [N] [FOLDER] [--verify]     FOLDER: data/fineweb10B if not said
#
# A second run downloads nothing: a file whose size is the one its header promises stays as it is, and with --verify
# its sha256 is compared, too. A run that was stopped leaves NAME.part, and the next one goes on there. A file gets
# its name when its size, its header and, where the host tells it, its sha256 are right; FOLDER/SHA256SUMS keeps the
# sums. Exit status 0: all files are there; 1: some are not, with a line for each; 130: Ctrl-C.
#
# Variables: FINEWEB_DIR       the folder
#            FINEWEB_URL       a mirror: the address before the files' names
#            FINEWEB_PARALLEL  downloads at a time (4)
#            FINEWEB_TRIES     tries of a file one after the other that bring less than 1 MiB (6)
#            FINEWEB_PAUSE_MS  before the second try (1000), doubled before each further one up to a minute
#            FINEWEB_STALL_S   seconds with less than 1 KB/s that end a try (30)
#            FINEWEB_SHARD_MB  what a file takes on the disk (200), asked for before the first byte
set -u
ROOT=$(dirname "$(realpath "$0")")/..
HOST=https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main
MAGIC=20240520 VERSION=1 HEADER_BYTES=1024 MOST_SHARDS=103
GAIN=1048576                       # bytes after which the tries are counted anew
LONGEST_PAUSE_MS=60000
LONGEST_RETRY_AFTER_S=300

stop() { echo "download_fineweb: $*" >&2; exit 1; }

# ---- what is wanted ------------------------------------------------------------------------
number() {      # number NAME VALUE LOW HIGH: into $result
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || [ "$((10#$2))" -lt "$3" ] || [ "$((10#$2))" -gt "$4" ]; then
        stop "$1 must be a whole number from $3 to $4, got '$2'; --help says more"
    fi
    result=$((10#$2))
}

verify="" places=()
for word in "$@"; do
    case $word in
        --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
        --verify) verify=1 ;;
        -*) stop "no flag is called $word; --help says which are" ;;
        *) places+=("$word") ;;
    esac
done
[ ${#places[@]} -le 2 ] || stop "too many words: ${places[*]}; --help says which are meant"
number "the number of training shards" "${places[0]:-9}" 0 $MOST_SHARDS; shards=$result
number FINEWEB_PARALLEL "${FINEWEB_PARALLEL:-4}" 1 64; parallel=$result
number FINEWEB_TRIES "${FINEWEB_TRIES:-6}" 1 1000; most_tries=$result
number FINEWEB_PAUSE_MS "${FINEWEB_PAUSE_MS:-1000}" 1 $LONGEST_PAUSE_MS; first_pause_ms=$result
number FINEWEB_STALL_S "${FINEWEB_STALL_S:-30}" 1 3600; stall_s=$result
number FINEWEB_SHARD_MB "${FINEWEB_SHARD_MB:-200}" 1 1000000; shard_mb=$result
url=${FINEWEB_URL:-$HOST}
url=${url%/}
dir=${places[1]:-${FINEWEB_DIR:-$ROOT/data/fineweb10B}}

names=(fineweb_val_000000.bin)
for ((i = 1; i <= shards; i++)); do names+=("$(printf 'fineweb_train_%06d.bin' $i)"); done

for tool in curl:curl flock:util-linux sha256sum:coreutils awk:mawk; do
    command -v "${tool%:*}" > /dev/null || stop "${tool%:*} is not here: apt install ${tool#*:} ca-certificates"
done
message=$(mkdir -p -- "$dir" 2>&1) || stop "$dir cannot be made (${message##*: }); name another folder: $0 $shards FOLDER"
dir=$(realpath -- "$dir")
lock=$dir/.download.lock
message=$({ : >> "$lock"; } 2>&1) || stop "$dir cannot be written to (${message##*: }); name another folder: $0 $shards FOLDER"

# ---- shards --------------------------------------------------------------------------------
# The size in bytes, 0 where there is no file.
size_of() { if [ -f "$1" ]; then wc -c < "$1"; else echo 0; fi; }

# The bytes that a file's header promises into $promised; returns 1 with $fault where it is not a shard's.
read_header() {
    local magic="" version="" tokens=""
    promised=0 fault=""
    read -r magic version tokens _ < <(od -An -v -td4 -N 12 -- "$1" 2> /dev/null)
    if [ -z "$tokens" ]; then fault="it ends within the header"
    elif [ "$magic" -ne $MAGIC ]; then fault="not a token shard: magic $magic, expected $MAGIC"
    elif [ "$version" -ne $VERSION ]; then fault="version $version of the shards' format, expected $VERSION"
    elif [ "$tokens" -lt 1 ]; then fault="a header that promises $tokens tokens"
    else promised=$((HEADER_BYTES + 2 * tokens))
    fi
    [ -z "$fault" ]
}

is_whole() { [ -f "$1" ] && read_header "$1" && [ "$(size_of "$1")" -eq "$promised" ]; }

sum_of() { sha256sum < "$1" | cut -c 1-64; }

known_sum() { [ -f "$dir/SHA256SUMS" ] && awk -v name="$1" '$2 == name { print $1 }' "$dir/SHA256SUMS"; }

keep_sum() {      # keep_sum NAME SUM
    { [ ! -f "$dir/SHA256SUMS" ] || awk -v name="$1" '$2 != name' "$dir/SHA256SUMS"; echo "$2  $1"; } > "$dir/SHA256SUMS.part" &&
        mv -f -- "$dir/SHA256SUMS.part" "$dir/SHA256SUMS"
}

free_mb() { df -Pk -- "$dir" | awk 'NR == 2 { print int($4 * 1024 / 1000000) }'; }

# ---- one run at a time ---------------------------------------------------------------------
# Whatever may write to the folder holds the lock: this process and its downloads, which inherit it.
exec 9>> "$lock"
flock -n 9
case $? in
    0) ;;
    1)  echo "another download into $dir is under way; this one waits for its end"
        flock 9 & waiting=$!
        trap 'kill $waiting; exit 130' INT TERM HUP
        wait $waiting
        trap - INT TERM HUP ;;
    *) echo "note  $dir does not support locks: do not start two downloads into it at the same time" ;;
esac

# ---- what is missing, and room for it ------------------------------------------------------
queue=() kept=0 wanted_mb=0
for name in "${names[@]}"; do
    final=$dir/$name
    if is_whole "$final"; then
        if [ -n "$verify" ]; then queue+=("$name"); else kept=$((kept + 1)); fi
        continue
    fi
    if [ -d "$final" ] || [ -d "$final.part" ]; then stop "$final or $final.part is a folder; move it away"; fi
    if [ -f "$final" ]; then
        # What another program left unfinished is as good a beginning as a .part.
        size=$(size_of "$final")
        if [ -z "$fault" ] && [ "$size" -lt "$promised" ] && [ "$size" -gt "$(size_of "$final.part")" ]; then
            echo "$name: has $size of the $promised bytes that its header promises"
            mv -f -- "$final" "$final.part"
        else
            echo "$name: ${fault:-has $size bytes, its header promises $promised}; it is deleted and fetched again"
            rm -f -- "$final"
        fi
    fi
    queue+=("$name")
    missing_mb=$((shard_mb - $(size_of "$final.part") / 1000000))
    [ $missing_mb -le 0 ] || wanted_mb=$((wanted_mb + missing_mb))
done
if [ ${#queue[@]} -eq 0 ]; then
    echo "$dir: all $kept files are there; nothing to download"
    exit 0
fi
if [ "$(free_mb)" -lt "$wanted_mb" ]; then
    stop "$dir has $(free_mb) MB free, the files that are missing want $wanted_mb; fewer shards: $0 M $dir; or another folder: $0 $shards FOLDER"
fi

# ---- one file, in a process of its own -----------------------------------------------------
run=$(mktemp -d) || stop "no temporary folder can be made: is $(dirname "$(mktemp -u)") full?"
mkfifo "$run/events"
exec 8<> "$run/events"

# tell note|fine|failed TEXT: one line to the main process, short enough that lines of several do not mix.
tell() { printf '%s %s %.600s\n' "$1" "$name" "${2//$'\n'/ }" >&8; }
pause() { sleep "$(($1 / 1000)).$(printf %03d $(($1 % 1000)))" 8>&- 9>&- & child=$!; wait $child; }

# header_value FIRST|LAST NAME: of all the answers on the way, or of the last one alone.
header_value() {
    awk -v which="$1" -v name="$2:" '
        { sub(/\r$/, "") }
        /^HTTP\// && which == "LAST" { value = "" }
        tolower($1) == name && (which == "LAST" || value == "") { value = $2; gsub(/"/, "", value) }
        END { print value }' "$run/$name.head" 2> /dev/null
}

# get FLAGS...: the HTTP status into $code, curl's into $status, what the host says about the file into $sum and
# $linked_size, and what went wrong, or nothing, into $fault.
get() {
    : > "$run/$name.head"
    curl --fail --silent --show-error --location --max-redirs 10 --globoff --proto '=http,https' \
         --connect-timeout 20 --speed-limit 1024 --speed-time "$stall_s" \
         --dump-header "$run/$name.head" --write-out '%{http_code}' "$@" "$url/$name" \
         > "$run/$name.code" 2> "$run/$name.err" 8>&- < /dev/null &
    child=$!
    echo $child > "$run/$name.child"
    wait $child; status=$?
    rm -f "$run/$name.child"
    code=$(tail -c 3 "$run/$name.code")
    sum=$(header_value FIRST x-linked-etag)
    [[ $sum =~ ^[0-9a-f]{64}$ ]] || sum=""
    linked_size=$(header_value FIRST x-linked-size)
    [[ $linked_size =~ ^[0-9]{1,15}$ ]] || linked_size=""
    fault=""
    if [ $status -eq 28 ] && grep -q 'too slow' "$run/$name.err"; then fault="stalled for $stall_s s"
    elif [ "${code:-000}" -ge 400 ]; then fault="the host answers $code"
    elif [ $status -ne 0 ]; then
        fault=$(tail -1 "$run/$name.err" | sed 's/^curl: ([0-9]*) //')
        fault=${fault:-curl ends with $status}
    fi
}

# What is wrong with $part as a whole file, into $fault; its sum into $actual_sum.
examine() {
    local size; size=$(size_of "$part")
    actual_sum=""
    read_header "$part" || return
    if [ "$size" -ne "$promised" ]; then fault="$size bytes, its header promises $promised"
    elif [ -n "$linked_size" ] && [ "$size" -ne "$linked_size" ]; then fault="$size bytes, the host says $linked_size"
    else
        actual_sum=$(sum_of "$part")
        [ -z "$sum" ] || [ "$sum" = "$actual_sum" ] || fault="sha256 $actual_sum, the host says $sum"
    fi
    [ -z "$fault" ]
}

# --verify of a file that is there; returns 1, after it is deleted, if it is wrong.
verify_file() {
    local from=SHA256SUMS actual
    sum=$(known_sum "$name")
    actual=$(sum_of "$final")
    if [ -z "$sum" ]; then
        get --head
        from="the host"
    fi
    if [ -z "$sum" ]; then
        tell fine "size and header are right, no sha256 is known${fault:+ ($fault)}"
    elif [ "$sum" = "$actual" ]; then
        echo "$actual" > "$run/$name.sum"
        tell fine "sha256 is that of $from"
    else
        tell note "sha256 $actual, $from says $sum; it is deleted and fetched again"
        rm -f -- "$final"
        return 1
    fi
}

fetch() {
    local final=$dir/$name part=$dir/$name.part child="" tries=1 wrong=0 best have size whole ms=$first_pause_ms after
    local code status sum linked_size fault promised=0 actual_sum from begun=$SECONDS how="sha256 is right"
    # A terminal's Ctrl-C comes to all processes of the group, but the main one ends the others.
    trap '' INT
    trap 'kill "$child" 2> /dev/null; exit 143' TERM HUP
    echo $BASHPID > "$run/$name.pid"
    if [ -n "$verify" ] && [ -f "$final" ]; then verify_file && return; fi
    best=$(size_of "$part")
    while true; do
        have=$(size_of "$part")
        if [ "$have" -gt 0 ] && { ! read_header "$part" || [ "$have" -gt "$promised" ]; }; then
            rm -f -- "$part"                   # not the beginning of a shard: what came may be any page
            have=0
        fi
        from=()
        [ "$have" -eq 0 ] || from=(--continue-at "$have")
        get "${from[@]}" --output "$part"
        size=$(size_of "$part")
        whole=""                               # as far as the host is concerned
        case $status:$code in
            # The host gives no bytes from there on. All are here, or this file starts again.
            33:* | *:416)
                if [ "$have" -gt 0 ] && [ "$have" -eq "$promised" ]; then
                    # Where the refusal did not tell the sum, another question does; not all hosts know HEAD.
                    [ -n "$sum" ] || get --head
                    case $sum:$fault:$code in ?*:*:* | ::* | *:405 | *:501) whole=1 ;; esac
                elif [ "$have" -gt 0 ]; then
                    fault="the host gives nothing from byte $have on"
                    rm -f -- "$part"
                fi ;;
            0:*) whole=1 ;;
            *:401 | *:404 | *:410 | 1:* | 3:* | 47:* | 60:* | 77:*)
                tell failed "$fault; is $url the right address?"
                return ;;
            23:*)
                tell failed "$part cannot be written; its disk has $(free_mb) MB free"
                return ;;
        esac
        if [ -n "$whole" ] && ! examine; then
            if [ "$size" -lt "$promised" ]; then
                # Ended early, unnoticed by curl because nobody told the length: go on, not again.
                fault="it ends after $size of $promised bytes"
            else
                rm -f -- "$part"
                wrong=$((wrong + 1))
                if [ $wrong -ge 2 ]; then tell failed "$fault (fetched twice, deleted)"; return; fi
                tell note "$fault; it is deleted and fetched once more"
                continue
            fi
        fi
        [ -n "$fault" ] || break
        if [ "$size" -ge $((best + GAIN)) ]; then tries=1 ms=$first_pause_ms best=$size; fi
        if [ $tries -ge "$most_tries" ]; then tell failed "$fault (try $tries of $most_tries)"; return; fi
        after=$(header_value LAST retry-after)
        if [[ $after =~ ^[0-9]{1,9}$ ]] && [ $((10#$after * 1000)) -gt "$ms" ]; then
            [ "$((10#$after))" -le $LONGEST_RETRY_AFTER_S ] || after=$LONGEST_RETRY_AFTER_S
            ms=$((10#$after * 1000))
        fi
        tell note "$fault (try $tries of $most_tries); again in $(((ms + 999) / 1000)) s from byte $(size_of "$part")"
        pause "$ms"
        tries=$((tries + 1)) ms=$((2 * ms))
        [ $ms -le $LONGEST_PAUSE_MS ] || ms=$LONGEST_PAUSE_MS
    done
    sync -- "$part" 2> /dev/null               # its bytes are on the disk before its name says so
    echo "$actual_sum" > "$run/$name.sum"
    [ -n "$sum" ] || how="size and header are right, the host tells no sha256"
    if fault=$(mv -f -- "$part" "$final" 2>&1); then
        tell fine "$size bytes in $((SECONDS - begun)) s; $how"
    else
        tell failed "$fault"
    fi
}

# ---- progress ------------------------------------------------------------------------------
declare -A pids=() absent=() first_size=() sizes=()
drawn=0 next=0 fine=0 failures=() begun=$SECONDS said=$SECONDS
terminal=""
[ -t 1 ] && terminal=1

erase() {
    [ $drawn -eq 0 ] || printf '\033[%dA\033[J' $drawn
    drawn=0
}
say() { erase; echo "$*"; }

megabytes() { printf '%d.%d' $(($1 / 1000000)) $(($1 / 100000 % 10)); }

summary() {      # of the downloads under way and of those that have ended since the beginning
    local name bytes=0
    for name in "${!first_size[@]}"; do
        [ -z "${pids[$name]:-}" ] || sizes[$name]=$(size_of "$dir/$name.part")
        bytes=$((bytes + sizes[$name] - first_size[$name]))
    done
    [ $bytes -ge 0 ] || bytes=0
    result="$((kept + fine)) of ${#names[@]} files, $(megabytes $bytes) MB in $((SECONDS - begun)) s"
    [ "$SECONDS" -eq "$begun" ] || result+=", $(megabytes $((bytes / (SECONDS - begun)))) MB/s"
}

draw() {      # the downloads under way, one line each, and one for all
    local name line lines=()
    summary
    for name in "${names[@]}"; do
        [ -n "${pids[$name]:-}" ] || continue
        line="$name  $(megabytes "${sizes[$name]}") MB"
        if [ "${sizes[$name]}" -ge 12 ] && read_header "$dir/$name.part"; then
            line+=" of $(megabytes "$promised")  $((100 * sizes[$name] / promised))%"
        fi
        lines+=("$line")
    done
    erase
    for line in "${lines[@]}" "$result"; do printf '%s\n' "${line:0:$((${COLUMNS:-80} - 1))}"; done
    drawn=$((${#lines[@]} + 1))
}

finish() {      # finish NAME fine|failed TEXT
    wait "${pids[$1]}" 2> /dev/null
    unset "pids[$1]"
    rm -f "$run/$1.pid"
    if [ "$2" = failed ]; then
        say "$1: given up"
        failures+=("$1: $3")
        sizes[$1]=$(size_of "$dir/$1.part")
        return
    fi
    say "$1: $3"
    fine=$((fine + 1))
    sizes[$1]=$(size_of "$dir/$1")
    [ ! -s "$run/$1.sum" ] || keep_sum "$1" "$(cat "$run/$1.sum")"
}

# ---- the end -------------------------------------------------------------------------------
guard=""
clean() {      # the downloads go with the main process
    trap '' INT TERM HUP
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2> /dev/null
    [ -z "$guard" ] || kill "$guard" 2> /dev/null
    wait
    rm -rf "$run"
}
interrupted() {      # interrupted STATUS
    say "download_fineweb: stopped; the same command goes on from here" >&2
    exit "$1"
}
trap clean EXIT
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP

# After kill -9 nothing of the above happens: this ends the downloads, which would hold the lock, then.
(
    exec 8>&- 9>&- > /dev/null 2>&1 < /dev/null
    while kill -0 $$; do sleep 1; done
    cat "$run"/*.pid | xargs -r kill
    rm -rf "$run"
) &
guard=$!

# ---- all files -----------------------------------------------------------------------------
echo "${#queue[@]} of ${#names[@]} files into $dir, $parallel at a time, from $url"
while [ $next -lt ${#queue[@]} ] || [ ${#pids[@]} -gt 0 ]; do
    while [ $next -lt ${#queue[@]} ] && [ ${#pids[@]} -lt "$parallel" ]; do
        name=${queue[next]}
        next=$((next + 1))
        first_size[$name]=$(size_of "$dir/$name.part")
        [ -z "$verify" ] || ! [ -f "$dir/$name" ] || first_size[$name]=$(size_of "$dir/$name")
        sizes[$name]=${first_size[$name]}
        fetch &
        pids[$name]=$!
    done
    if read -r -t 0.5 -u 8 event name text; then
        absent=()
        if [ "$event" = note ]; then say "$name: $text"; else finish "$name" "$event" "$text"; fi
    else
        # A process that ended without a word was killed. Its word may have come since the wait: it gets a second one.
        for name in "${!pids[@]}"; do
            kill -0 "${pids[$name]}" 2> /dev/null && continue
            if [ -n "${absent[$name]:-}" ]; then
                kill "$(cat "$run/$name.child" 2> /dev/null)" 2> /dev/null
                finish "$name" failed "its process was killed"
            else
                absent[$name]=1
            fi
        done
    fi
    if [ -n "$terminal" ]; then
        draw
    elif [ $((SECONDS - said)) -ge 30 ]; then
        said=$SECONDS
        summary
        echo "$result"
    fi
done
erase

if [ ${#failures[@]} -gt 0 ]; then
    printf 'download_fineweb: %s\n' "${failures[@]}" >&2
    echo "download_fineweb: ${#failures[@]} of ${#names[@]} files are not there; the same command goes on where this one ended," \
         "FINEWEB_URL=ADDRESS names a mirror" >&2
    exit 1
fi
summary
echo "$dir: all ${#names[@]} files are there ($result)"
