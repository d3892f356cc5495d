# Sourced by the other scripts: makes .venv at the repository root and installs into it.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
#   ensure_venv dev        # .venv exists and holds the package with its [dev] extra
#   "$VENV_PYTHON" -m pytest
#
# PYTHON names the interpreter to make the environment with (default: python3). Versions are
# pinned by constraints.txt. pip's own configuration is honoured: set PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to install from elsewhere, for instance to take
# PyTorch's smaller CPU-only build.
#
# TORCH_VERSION takes another torch than the pinned one, in .venv-torch-$TORCH_VERSION. "newest" is the
# newest release, "nightly" last night's build, from the index that TORCH_NIGHTLY_INDEX names (PyTorch's
# installation page has it, for each kind of device); both are looked up anew each time.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV_DIR="$REPO_ROOT/.venv${TORCH_VERSION:+-torch-$TORCH_VERSION}"
VENV_PYTHON="$VENV_DIR/bin/python"

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

_check_python() { # $1: interpreter
    command -v "$1" >/dev/null || die "no '$1' found. Install Python 3.10 or newer, or set PYTHON=/path/to/python3."
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die \
        "$("$1" --version 2>&1) ($1) is too old: Python 3.10 or newer is needed. Set PYTHON=/path/to/python3 (and remove $VENV_DIR if it was made with the old one)."
}

_make_venv() {
    local python="${PYTHON:-python3}"
    _check_python "$python"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die \
        "$python has no working 'venv' module. On Debian or Ubuntu: apt install python3-venv"
    say "making $(basename "$VENV_DIR") with $("$python" --version)"
    "$python" -m venv "$VENV_DIR" || { rm -rf "$VENV_DIR"; die "'$python -m venv' failed; see above."; }
}

_constraints() { # without torch, and what its versions bound, where it is not the pinned one
    if [ -z "${TORCH_VERSION:-}" ]; then
        cat "$REPO_ROOT/constraints.txt"
    else
        case "$TORCH_VERSION" in newest | nightly) ;; *) echo "torch==$TORCH_VERSION" ;; esac
        grep -vE '^(torch|setuptools)==' "$REPO_ROOT/constraints.txt"
    fi
}

_fingerprint() { # $1: extras
    { echo "$REPO_ROOT $1"; cat "$REPO_ROOT/pyproject.toml"; _constraints; } |
        "$VENV_PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

_pip_install() {
    _constraints >"$VENV_DIR/constraints.txt"
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint "$VENV_DIR/constraints.txt" "$@" || die "pip install $* failed; see above."
}

ensure_venv() { # $1: extras, comma-separated
    local extras="$1" fingerprint stamp torch
    [ "${TORCH_VERSION:-}" != nightly ] || [ -n "${TORCH_NIGHTLY_INDEX:-}" ] || die \
        "nightly builds have an index of their own: set TORCH_NIGHTLY_INDEX to the address that PyTorch's installation page gives."
    [ -x "$VENV_PYTHON" ] || _make_venv
    _check_python "$VENV_PYTHON"
    stamp="$VENV_DIR/.installed-$extras"
    fingerprint="$(_fingerprint "$extras")"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
        return
    fi
    # torch alone and first: whatever else asks for torch then finds the pinned one in place.
    case "${TORCH_VERSION:-}" in
    newest) torch=(--upgrade torch) ;;
    nightly) torch=(--upgrade --pre torch --index-url "$TORCH_NIGHTLY_INDEX") ;;
    *) torch=(torch) ;;
    esac
    say "installing torch (the longest part; once only)"
    _pip_install "${torch[@]}"
    say "installing torch_secondorder[$extras]"
    _pip_install --editable "$REPO_ROOT[$extras]"
    case "${TORCH_VERSION:-}" in newest | nightly) ;; *) echo "$fingerprint" >"$stamp" ;; esac
}
