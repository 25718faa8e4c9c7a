#!/usr/bin/env bash
# Installs what is missing, builds, runs every test; the last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
. scripts/install.sh
need_build_tools
exec test/run_all.sh
