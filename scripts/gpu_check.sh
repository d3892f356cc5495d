#!/usr/bin/env bash
# Checks this library on a machine with a CUDA device: runs the tests marked `cuda` and every
# benchmark on the device, into one JSON file.
#
#   scripts/gpu_check.sh [FILE] [options of scripts/bench.py]     (FILE: gpu_check.json)
#
# Takes the first Python whose torch sees the device: $PYTHON, .venv, python, python3. pytest must
# be installed there; peers of the `bench` extra are skipped where they are not.
# GPU_CHECK_DEVICE=cpu rehearses the script on a machine without a device.
#
# Exit status: 0 when the tests passed and the benchmarks ran; 1 without a device or after a
# failure, where the JSON file holds what could be found out.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
output="${1:-gpu_check.json}"
shift || true
device="${GPU_CHECK_DEVICE:-cuda}"

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

sees_device() { # $1: interpreter
    command -v "$1" >/dev/null || return 1
    "$1" -c "import sys, torch; sys.exit(sys.argv[1] == 'cuda' and not torch.cuda.is_available())" \
        "$device" 2>/dev/null
}

python=""
for candidate in "${PYTHON:-}" .venv/bin/python python python3; do
    if [ -n "$candidate" ] && sees_device "$candidate"; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || die "no CUDA device: tried \$PYTHON (${PYTHON:-not set}), .venv/bin/python, python and \
python3, and none has a torch that sees one. Nothing was checked."
say "using $("$python" -c 'import sys, torch; print(sys.executable, "with torch", torch.__version__)')"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

say "1 of 2: pytest -m cuda"
"$python" -m pytest -m cuda --junitxml "$scratch/tests.xml"
tests_status=$?
[ "$tests_status" -ne 5 ] || say "no test is marked cuda, which is itself a failure"

say "2 of 2: benchmarks on $device"
"$python" scripts/bench.py all --device "$device" --json "$scratch/bench.json" "$@"
bench_status=$?

"$python" - "$scratch" "$output" "$tests_status" "$bench_status" <<'PYTHON'
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

scratch, output, tests_status, bench_status = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
document = {"environment": None, "results": {}}
if (scratch / "bench.json").exists():
    document = json.loads((scratch / "bench.json").read_text())
tests = {"status": int(tests_status)}
if (scratch / "tests.xml").exists():
    suites = ElementTree.parse(scratch / "tests.xml").getroot().findall("testsuite")
    keys = ("tests", "failures", "errors", "skipped")
    total, failures, errors, skipped = (sum(int(s.get(key, 0)) for s in suites) for key in keys)
    tests |= {"passed": total - failures - errors - skipped, "failed": failures}
    tests |= {"errors": errors, "skipped": skipped}
    cases = [case for suite in suites for case in suite.findall("testcase")]
    tests["failing"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
else:
    tests["note"] = "pytest left no report: is it installed?"
output.write_text(json.dumps({"pytest": tests, "bench_status": int(bench_status), **document}, indent=1) + "\n")
print(f"pytest: {tests}\nwrote {output}")
PYTHON

[ "$tests_status" -eq 0 ] && [ "$bench_status" -eq 0 ] || die "pytest ended with $tests_status, \
the benchmarks with $bench_status; see above and $output"
say "all passed"
