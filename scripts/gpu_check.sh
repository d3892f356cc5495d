#!/usr/bin/env bash
# Checks this library on a machine with a CUDA device, in a few minutes: runs the tests marked
# `cuda`, then the benchmarks that tell most on a device, into one JSON file.
#
#   scripts/gpu_check.sh [FILE] [--minutes N] [options of scripts/bench.py]
#   scripts/gpu_check.sh --rehearse             the same on a CPU: few tests, small sizes
#
# FILE (gpu_check.json) is written anew after each part. It ends within N minutes (8) whatever
# happens: each part has a limit of its own, the most telling come first, and what there is no time
# for is named as skipped. At the end, a table compares the figures with their bars
# (scripts/_gpu_bars.py): met, missed or not measured; it is in FILE, too.
#
# Takes the first Python whose torch sees the device: $PYTHON, .venv, python, python3. There have to
# be torch, numpy, scipy, pytest and hypothesis, and nothing else. The tests run in as many processes
# as the processor has room for (scripts/_device_tests.py), and one that hangs or crashes costs no
# other. Peers of the `bench` extra are compared with where they are installed.
#
# Exit status: 0 when the tests passed and the benchmarks ran; 1 without a device or after a
# failure, where the JSON file holds what could be found out. Bars that are missed do not count.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
device="${GPU_CHECK_DEVICE:-cuda}"
for argument in "$@"; do
    [ "$argument" != --rehearse ] || device=cpu
done

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# A driver that hangs must not hold this up.
limited() {
    if command -v timeout >/dev/null; then
        timeout --kill-after=5 "${GPU_CHECK_PATIENCE:-60}" "$@"
    else
        "$@"
    fi
}

sees_device() { # $1: interpreter
    command -v "$1" >/dev/null || return 1
    limited "$1" -c "import sys, torch; sys.exit(sys.argv[1] == 'cuda' and not torch.cuda.is_available())" \
        "$device" 2>/dev/null
}

for candidate in "${PYTHON:-}" .venv/bin/python python python3; do
    if [ -n "$candidate" ] && sees_device "$candidate"; then
        exec "$candidate" scripts/gpu_check.py --device "$device" "$@"
    fi
done
die "no CUDA device: tried \$PYTHON (${PYTHON:-not set}), .venv/bin/python, python and python3, and \
none has a torch that sees one. Nothing was checked."
