# Sourced by quickstart.sh and test.sh: installs, through apt, what building needs and this machine lacks.
# need FILE-OR-COMMAND PACKAGE ...   pairs: when the first is not there, the second is installed.
need() {
    local missing=()
    while [ $# -gt 1 ]; do
        case "$1" in
            */*) [ -e "$1" ] || missing+=("$2") ;;
            *) command -v "$1" > /dev/null || missing+=("$2") ;;
        esac
        shift 2
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    if ! command -v apt-get > /dev/null; then
        echo "this system has no apt-get; please install the equivalents of: ${missing[*]}" >&2
        exit 1
    fi
    local sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo > /dev/null || { echo "need root or sudo to install: ${missing[*]}" >&2; exit 1; }
        sudo="sudo"
    fi
    echo "installing ${missing[*]}"
    local log; log=$(mktemp)
    if ! { $sudo apt-get update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
        tail -5 "$log" >&2
        echo "could not install: ${missing[*]}   (the whole output is in $log)" >&2
        exit 1
    fi
    rm -f "$log"
}

need_build_tools() {
    need g++ g++ make make git git
    command -v g++ > /dev/null && echo '#include <dnnl.h>' | g++ -E -x c++ - > /dev/null 2>&1 || need /dnnl.h libdnnl-dev
}
