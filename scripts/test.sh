#!/usr/bin/env bash
# Sets up .venv where needed and runs everything that CI runs.
# Arguments go to pytest: scripts/test.sh -k lbfgs -m "not slow".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$REPO_ROOT"
say "ruff check"
"$VENV_PYTHON" -m ruff check .
say "ruff format --check"
"$VENV_PYTHON" -m ruff format --check .
say "mypy torch_secondorder"
"$VENV_PYTHON" -m mypy torch_secondorder
say "pytest"
# Two processes with one thread each: most tests are too small for more. A file's tests stay together,
# for they share what it took processes to find out.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV_PYTHON" -m pytest --numprocesses=2 --dist=loadfile --durations=10 "$@"
