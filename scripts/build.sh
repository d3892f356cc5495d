#!/usr/bin/env bash
# Builds the sdist and the wheel into dist/, and checks them in an environment of their own.
#
#   scripts/build.sh              as scripts/test.sh does
#   scripts/build.sh --release    also refuses what must not be published, such as placeholders
set -euo pipefail

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{ /^set /!s/^# \{0,1\}//p; }' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$REPO_ROOT"
exec "$VENV_PYTHON" scripts/build.py "$@"
