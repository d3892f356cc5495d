"""The work of scripts/gpu_check.sh: tests, then benchmarks one by one, each with a time limit."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT / "scripts"))

from _device_tests import Tests, files_of  # noqa: E402
from _gpu_bars import rows, table  # noqa: E402


@dataclass(frozen=True)
class Benchmark:
    """A sub-command of scripts/bench.py, a part of it, and the seconds that it may take."""

    name: str
    part: str | None
    seconds: int

    @property
    def title(self) -> str:
        """The name in the document."""
        return f"{self.name} {self.part}" if self.part else self.name


#: The most telling first: those with a bar, then those that explain them.
BENCHMARKS = (
    Benchmark("lbfgs", "direction", 60),
    Benchmark("diagonal", "steps", 60),
    Benchmark("captured", "steps", 45),
    Benchmark("products", None, 60),
    Benchmark("compile", None, 60),
    Benchmark("newton", "pinn", 60),
    Benchmark("newton", "autoencoder", 60),
    Benchmark("captured", "direction", 20),
    Benchmark("captured", "products", 60),
    Benchmark("captured", "allocations", 20),
    Benchmark("captured", "transfers", 15),
    Benchmark("newton", "cg", 40),
    Benchmark("residuals", "jacobian", 40),
    Benchmark("jacobian", None, 30),
    Benchmark("penalties", None, 30),
    Benchmark("capture", None, 30),
    Benchmark("lbfgs", "softmax", 30),
)
#: Seconds that the tests may take, at most this share of all.
TESTS, SHARE = 300, 0.55
#: Seconds that a test may take, and that processes are given to end.
ONE_TEST, GRACE = 60, 3
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
        self.document: dict[str, Any] = {"environment": None, "pytest": None, "bars": []}
        self.document |= {"benchmarks": {}, "results": {}}
        self.written = False

    def left(self) -> float:
        """Seconds that are left, less what it takes to come to an end."""
        return self.end - time.monotonic() - 3 * GRACE

    def write(self) -> None:
        """Writes what is known so far, never half of it; goes on where that fails."""
        self.document["bars"] = rows(self.document["results"], self.document["pytest"])
        target: Path = self.given.file
        beside = target.with_name(target.name + ".part")
        self.written = False
        try:
            beside.write_text(json.dumps(self.document, indent=1) + "\n")
            beside.replace(target)
            self.written = True
        except OSError as error:
            _say(f"{target} could not be written: {error}")

    def run_tests(self) -> None:
        """Runs the tests on the device."""
        cuda = self.given.device == "cuda"
        files = files_of(ROOT / "tests") if cuda else REHEARSED
        marks = "cuda" if cuda else "not cuda and not testdevice"
        workers = min(14, max(2, (os.cpu_count() or 2) * 7 // 8), len(files))
        limit = min(TESTS, SHARE * self.left())
        _say(f"tests: {len(files)} files in {workers} processes, {limit:.0f} s at most")
        tests = Tests(files, marks, workers, limit, ONE_TEST)
        tests.run()
        self.document["pytest"] = tests.summary()
        shown = ("passed", "failed", "errors", "skipped", "seconds", "files not finished")
        _say("tests: " + ", ".join(f"{self.document['pytest'][key]} {key}" for key in shown))

    def run_benchmark(self, benchmark: Benchmark, scratch: Path) -> None:
        """Runs one benchmark, and takes in what it has measured, be it all or not."""
        title, limit = benchmark.title, min(benchmark.seconds, self.left())
        if limit < 10:
            self.document["benchmarks"][title] = {"status": "skipped: no time is left"}
            return
        output = scratch / f"{title}.json"
        command = [sys.executable, "scripts/bench.py", benchmark.name]
        command += ["--part", benchmark.part] if benchmark.part else []
        command += ["--device", self.given.device, "--json", str(output)]
        # What ends at a limit of time shall end before this one.
        command += ["--seconds", f"{limit:.0f}", *self.extra]
        _say(f"{title}: {limit:.0f} s at most")
        status, seconds = _run(command, limit)
        self.document["benchmarks"][title] = {"status": status, "seconds": seconds}
        try:
            made = json.loads(output.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.document["benchmarks"][title]["unread"] = str(error)
            return
        self.document["environment"] = self.document["environment"] or made["environment"]
        self.document["results"] |= made["results"]

    @property
    def passed(self) -> bool:
        """True if the tests passed, no benchmark that ran failed, and the document is written."""
        statuses = [entry["status"] for entry in self.document["benchmarks"].values()]
        failed = [status for status in statuses if isinstance(status, int) and status != 0]
        return self.document["pytest"]["status"] == 0 and not failed and self.written


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
        check.run_tests()
        check.write()
        for benchmark in BENCHMARKS:
            check.run_benchmark(benchmark, Path(scratch))
            check.write()
    if check.written:
        _say(f"wrote {check.given.file}")
    for title, entry in check.document["benchmarks"].items():
        if entry["status"] != 0:
            _say(f"{title}: {entry['status']}")
    print(table(check.document["bars"]), flush=True)
    if check.given.rehearse:
        _say("a rehearsal: its figures say nothing about a device")
    _say("all passed" if check.passed else "something failed, see above")
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
