#!/usr/bin/env bash
# Installs what is missing, builds, runs every test; the last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/install.sh
need_build_tools
command -v curl > /dev/null || install curl || exit 1      # test/download.sh
exec test/run_all.sh
