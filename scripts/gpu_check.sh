#!/usr/bin/env bash
# Checks this library on a machine with a CUDA device, in a few minutes: runs the tests marked
# `cuda`, then the benchmarks that tell most on a device, into one JSON file.
#
#   scripts/gpu_check.sh [FILE] [--minutes N] [options of scripts/bench.py]
#
# FILE (gpu_check.json) is written anew after each part. It ends within N minutes (8) whatever
# happens: each part has a limit of its own, and what there is no time for is named as skipped.
#
# Takes the first Python whose torch sees the device: $PYTHON, .venv, python, python3. There have to
# be torch, numpy, scipy, pytest and hypothesis; pytest-xdist spreads the tests over processes and
# pytest-timeout ends those that hang, where they are installed; so are peers of the `bench` extra.
# GPU_CHECK_DEVICE=cpu rehearses the script on a machine without a device, with few tests;
# --rehearse does the same, with --quick.
#
# Exit status: 0 when the tests passed and the benchmarks ran; 1 without a device or after a
# failure, where the JSON file holds what could be found out.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
device="${GPU_CHECK_DEVICE:-cuda}"
for argument in "$@"; do
    [ "$argument" != --rehearse ] || device=cpu
done

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

sees_device() { # $1: interpreter
    command -v "$1" >/dev/null || return 1
    "$1" -c "import sys, torch; sys.exit(sys.argv[1] == 'cuda' and not torch.cuda.is_available())" \
        "$device" 2>/dev/null
}

for candidate in "${PYTHON:-}" .venv/bin/python python python3; do
    if [ -n "$candidate" ] && sees_device "$candidate"; then
        exec "$candidate" scripts/gpu_check.py --device "$device" "$@"
    fi
done
die "no CUDA device: tried \$PYTHON (${PYTHON:-not set}), .venv/bin/python, python and python3, and \
none has a torch that sees one. Nothing was checked."
