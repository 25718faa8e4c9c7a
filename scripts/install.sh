# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: installs, through apt, what building needs and this machine lacks.

# install PACKAGE...: returns 1, with one message, where it cannot.
install() {
    [ $# -gt 0 ] || return 0
    local sudo="" log
    if ! command -v apt-get > /dev/null; then
        echo "this system has no apt-get; please install its equivalents of: $*" >&2
        return 1
    fi
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo > /dev/null || { echo "need root or sudo to install: $*" >&2; return 1; }
        sudo="sudo"
    fi
    echo "installing $*"
    log=$(mktemp)
    # Without the network update fails with warnings alone, and install then knows no package.
    if ! { $sudo apt-get update &&
           $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
         } > "$log" 2>&1; then
        grep -E '^(E:|W:|Err)' "$log" | tail -3 >&2
        echo "could not install: $*   (the whole output is in $log)" >&2
        return 1
    fi
    rm -f "$log"
}

has_dnnl() {
    if command -v g++ > /dev/null; then
        echo '#include <dnnl.h>' | g++ -E -x c++ - > /dev/null 2>&1
    else
        [ -e /usr/include/dnnl.h ]
    fi
}

has_mpi() {
    echo '#include <mpi.h>' | "${MPICC:-mpicc}" -E -x c - > /dev/null 2>&1
}

# A compiler, make, the library of the CPU's matrix products, and MPI, of any make, for several ranks.
need_build_tools() {
    local missing=()
    command -v g++ > /dev/null || missing+=(g++)
    command -v make > /dev/null || missing+=(make)
    has_dnnl || missing+=(libdnnl-dev)
    [ -e /usr/include/zlib.h ] || missing+=(zlib1g-dev)      # tokenize reads .gz
    if [ -z "${MPI_HOME:-}" ] && [ "${NCCL:-1}" != 0 ]; then
        has_mpi || missing+=(libopenmpi-dev)
        command -v mpirun > /dev/null || missing+=(openmpi-bin)
    fi
    install "${missing[@]}" || exit 1
    has_dnnl || { echo "$(command -v g++) does not find dnnl.h: is libdnnl-dev (oneDNN) installed?" >&2; exit 1; }
}
