#!/usr/bin/env bash
# Sets up .venv where needed and runs everything that CI runs.
#
#   scripts/test.sh [--torch VERSION | --coverage] [arguments of pytest]
#
#   scripts/test.sh                            ruff, mypy, the site, sdist and wheel, pytest
#   scripts/test.sh -k lbfgs -m "not slow"     arguments go to pytest; site and sdist are left out
#   scripts/test.sh --torch 2.11.0             the tests alone, on another version of torch, in an
#                                              environment of its own: .venv-torch-VERSION;
#                                              "newest" and "nightly" are versions too, the
#                                              second with TORCH_NIGHTLY_INDEX set
#   scripts/test.sh --coverage                 the tests, and the lines of the package that they run
#
# All other packages are those of constraints.txt, but for what that torch does not go with. From the
# package index a torch for Linux is a CUDA build of some 3 GB with what it needs; see
# scripts/_venv.sh for how to take a CPU-only one.
set -euo pipefail

COVERAGE=
case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{ /^set /!s/^# \{0,1\}//p; }' "${BASH_SOURCE[0]}"
    exit
    ;;
--coverage) COVERAGE=1 && shift ;;
--torch=*) TORCH_VERSION="${1#*=}" && shift ;;
--torch)
    TORCH_VERSION="${2:-}"
    shift "$(($# < 2 ? $# : 2))"
    [ -n "$TORCH_VERSION" ] || { echo "error: --torch needs a version, such as 2.11.0" >&2 && exit 2; }
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv dev
cd "$REPO_ROOT"
if [ -z "${TORCH_VERSION:-}" ]; then
    say "ruff check"
    "$VENV_PYTHON" -m ruff check .
    say "ruff format --check"
    "$VENV_PYTHON" -m ruff format --check .
    say "mypy torch_secondorder"
    "$VENV_PYTHON" -m mypy torch_secondorder
    if [ $# = 0 ]; then
        say "the documentation site"
        "$REPO_ROOT/scripts/docs.sh" build
        say "sdist and wheel"
        "$VENV_PYTHON" scripts/build.py
    fi
fi
say "pytest, torch $("$VENV_PYTHON" -c 'import torch; print(torch.__version__)')"
# Two processes with one thread each: most tests are too small for more. A file's tests stay together,
# for they share what it took processes to find out.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
pytest=(pytest --numprocesses=2 --dist=loadfile --durations=10 "$@")
if [ -n "$COVERAGE" ]; then
    "$VENV_PYTHON" -m coverage erase
    "$VENV_PYTHON" -m coverage run -m "${pytest[@]}"
    "$VENV_PYTHON" -m coverage combine --quiet
    exec "$VENV_PYTHON" -m coverage report
fi
exec "$VENV_PYTHON" -m "${pytest[@]}"
