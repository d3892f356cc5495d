#!/usr/bin/env bash
# Sets up .venv where needed and compares optimizers on real images.
# Arguments go to examples/compare_optimizers.py; try scripts/demo.sh --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv examples
exec "$VENV_PYTHON" "$REPO_ROOT/examples/compare_optimizers.py" "$@"
