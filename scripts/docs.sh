#!/usr/bin/env bash
# Builds the documentation site.
#
#   scripts/docs.sh                   serves it at http://127.0.0.1:8000 and builds it anew when files change
#   scripts/docs.sh build [FOLDER]    builds it into FOLDER (default: site/); a warning is an error, as in CI
#
# No network is needed once .venv is there.
set -euo pipefail

case "${1:-serve}" in
-h | --help)
    sed -n '2,/^set /{ /^set /!s/^# \{0,1\}//p; }' "${BASH_SOURCE[0]}"
    exit
    ;;
serve | build) ;;
*) echo "error: unknown command '$1'; see scripts/docs.sh --help" >&2 && exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$REPO_ROOT"
export NO_MKDOCS_2_WARNING=1 # an advertisement of the theme
if [ "${1:-serve}" = build ]; then
    # Not --quiet: warnings that are not logged are not counted by --strict.
    exec "$VENV_PYTHON" -m mkdocs build --strict --site-dir "${2:-site}"
fi
exec "$VENV_PYTHON" -m mkdocs serve --no-strict --watch torch_secondorder --watch scripts/site
