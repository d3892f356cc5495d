"""The work of scripts/gpu_check.sh: tests, then benchmarks one by one, each with a time limit."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent

#: Benchmarks, the most telling first: sub-command, part, and the seconds it may take.
BENCHMARKS: tuple[tuple[str, str | None, int], ...] = (
    ("lbfgs", "direction", 60),
    ("products", None, 75),
    ("newton", "cg", 60),
    ("diagonal", "steps", 75),
    ("jacobian", None, 40),
    ("penalties", None, 40),
    ("capture", None, 40),
    ("newton", "autoencoder", 75),
    ("lbfgs", "softmax", 60),
    ("newton", "pinn", 75),
    ("newton", "softmax", 60),
)
#: Seconds that the tests may take, at most this share of all.
TESTS, SHARE = 300, 0.6
#: Seconds that a test may take, and that processes are given to end.
ONE_TEST, GRACE = 120, 5
#: What is run of the tests where there is no device, to see that this works.
REHEARSED = ("tests/curvature/test_inverse_bfgs.py", "tests/closure/test_replay.py")


class Check:
    """One run, and its document.

    Args:
        given: The command line.
        extra: Options for scripts/bench.py.
    """

    def __init__(self, given: argparse.Namespace, extra: Sequence[str]) -> None:
        self.given, self.extra = given, list(extra)
        self.end = time.monotonic() + 60.0 * given.minutes
        self.document: dict[str, Any] = {"environment": None, "pytest": None, "benchmarks": {}}
        self.document["results"] = {}

    def left(self) -> float:
        """Seconds that are left, less what it takes to come to an end."""
        return self.end - time.monotonic() - 3 * GRACE

    def write(self) -> None:
        """Writes what is known so far; never half of it."""
        target: Path = self.given.file
        beside = target.with_name(target.name + ".part")
        beside.write_text(json.dumps(self.document, indent=1) + "\n")
        beside.replace(target)

    def run_tests(self, scratch: Path) -> None:
        """Runs the tests on the device."""
        report = scratch / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark", "--junitxml", str(report)]
        command += ["-m", "cuda"] if self.given.device == "cuda" else REHEARSED
        if _installed("xdist"):
            workers = min(12, max(2, (os.cpu_count() or 2) * 3 // 4))
            command += ["-n", str(workers), "--dist", "loadfile"]
        if _installed("pytest_timeout"):
            command += ["--timeout", str(ONE_TEST)]
        limit = min(TESTS, SHARE * self.left())
        status, seconds = _run(command, limit)
        found: dict[str, Any] = {"status": status, "seconds": seconds}
        if status == 5:
            found["note"] = "no test is marked cuda, which is itself a failure"
        if report.exists():
            found |= _summary(report)
        else:
            found["note"] = "pytest left no report: is it installed, and was there time enough?"
        self.document["pytest"] = found
        shown = {k: v for k, v in found.items() if k != "failing"}
        _say(f"pytest: {shown}")

    def run_benchmark(self, name: str, part: str | None, limit: float, scratch: Path) -> None:
        """Runs one benchmark, and takes in what it has measured, be it all or not."""
        title = f"{name} {part}" if part else name
        limit = min(limit, self.left())
        if limit < 10:
            self.document["benchmarks"][title] = {"status": "skipped: no time is left"}
            return
        output = scratch / f"{title}.json"
        command = [sys.executable, "scripts/bench.py", name, *(("--part", part) if part else ())]
        command += ["--device", self.given.device, "--json", str(output)]
        # What ends at a limit of time shall end before this one.
        command += ["--seconds", f"{limit:.0f}", *self.extra]
        _say(f"{title}: {limit:.0f} s at most")
        status, seconds = _run(command, limit)
        self.document["benchmarks"][title] = {"status": status, "seconds": seconds}
        if output.exists():
            made = json.loads(output.read_text())
            self.document["environment"] = self.document["environment"] or made["environment"]
            self.document["results"] |= made["results"]

    @property
    def passed(self) -> bool:
        """True if the tests passed and no benchmark failed; skipped ones do not count as failed."""
        statuses = [entry["status"] for entry in self.document["benchmarks"].values()]
        failed = [status for status in statuses if isinstance(status, int) and status != 0]
        return self.document["pytest"]["status"] == 0 and not failed


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _say(line: str) -> None:
    print(f"==> {line}", file=sys.stderr, flush=True)


def _run(command: Sequence[str], limit: float) -> tuple[int | str, float]:
    """Runs a command and all processes it starts, no longer than a limit."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    status: int | str
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        # Also where this is interrupted: nothing is to go on using the device.
        if process.poll() is None:
            _signal(process, signal.SIGINT)
        _signal(process, signal.SIGKILL)
    return status, round(time.monotonic() - start, 1)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
        process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def _summary(report: Path) -> dict[str, Any]:
    """Counts and names from a JUnit report."""
    try:
        suites = ElementTree.parse(report).getroot().findall("testsuite")
    except ElementTree.ParseError:
        return {"note": "the report of pytest is not whole"}
    keys = ("tests", "failures", "errors", "skipped")
    total, failures, errors, skipped = (sum(int(s.get(key, 0)) for s in suites) for key in keys)
    bad = [
        case
        for suite in suites
        for case in suite.findall("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": total - failures - errors - skipped,
        "failed": failures,
        "errors": errors,
        "skipped": skipped,
        "failing": {f"{c.get('classname')}::{c.get('name')}": _message(c) for c in bad},
    }


def _message(case: ElementTree.Element) -> str:
    """The end of what pytest says about a test that failed."""
    found = case.find("failure")
    found = case.find("error") if found is None else found
    assert found is not None
    return (found.text or found.get("message") or "")[-2000:]


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line; what is left of it is for scripts/bench.py."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with --quick")
    given, extra = parser.parse_known_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be positive, not {given.minutes:g}")
    if given.rehearse:
        given.device = "cpu"
        extra.append("--quick")
    given.file = given.file.absolute()
    return given, extra


def main() -> int:
    """Runs everything, and says where the document is."""
    check = Check(*parse())
    with tempfile.TemporaryDirectory() as scratch:
        check.run_tests(Path(scratch))
        check.write()
        for name, part, limit in BENCHMARKS:
            check.run_benchmark(name, part, limit, Path(scratch))
            check.write()
    _say(f"wrote {check.given.file}")
    for title, entry in check.document["benchmarks"].items():
        if entry["status"] != 0:
            _say(f"{title}: {entry['status']}")
    _say("all passed" if check.passed else "something failed, see above")
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
