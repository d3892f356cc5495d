"""Runs the tests of a device in several processes, and keeps each result as it comes.

Each process is a worker of this file: it takes a test file at a time, runs pytest on it, and
reports the start and the end of each test on its standard output, a line of JSON each. So the
results are known whenever time is up, no process collects more than the files that it runs, and
pytest-xdist is not needed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Seconds that a process may take between two tests: for imports, collection and its end.
START = 90.0
#: Test files, the most telling first: the others follow.
FIRST = (
    "tests/optim/test_conformance.py",
    "tests/optim/test_lbfgs",
    "tests/optim/test_adahessian.py",
    "tests/curvature/",
    "tests/closure/",
    "tests/objective/",
    "tests/optim/",
    "tests/solvers/",
    "tests/autograd/",
)
#: What is left of the message of a test that failed.
MESSAGE = 2000


def files_of(directory: Path) -> list[str]:
    """The files with tests for devices, the most telling first, then the largest."""
    for_devices = re.compile(r"def \w+\([^)]*\bdevice\b|\bmark\.cuda\b")
    sizes = {}
    for path in directory.rglob("test_*.py"):
        text = path.read_text()
        if for_devices.search(text):
            sizes[path.relative_to(ROOT).as_posix()] = len(text)

    def rank(name: str) -> int:
        return next((i for i, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))

    return sorted(sizes, key=lambda name: (rank(name), -sizes[name]))


@dataclass
class Tests:
    """The tests of some files, spread over processes.

    Attributes:
        files: Their paths, in the order of their starts.
        marks: pytest's expression of marks.
        workers: Number of processes.
        limit: Seconds for all.
        one_test: Seconds for one test; a process whose test takes longer is ended.
        results: Outcome, seconds and message by test.
        unfinished: Files that were not run to their ends.
    """

    files: Sequence[str]
    marks: str
    workers: int
    limit: float
    one_test: float
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Runs them all, or as many as there is time for."""
        start = time.monotonic()
        self._end = start + self.limit
        self._left, self._lock = deque(self.files), threading.Lock()
        self.unfinished = set(self.files)
        threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:  # all together have ten more seconds to end their processes
            thread.join(max(0.0, self._end + 10.0 - time.monotonic()))
        self.seconds = round(time.monotonic() - start, 1)

    def summary(self) -> dict[str, Any]:
        """Counts, and the messages of those that failed."""
        with self._lock:
            results, unfinished = dict(self.results), sorted(self.unfinished)
        outcomes = [result["outcome"] for result in results.values()]
        bad = {k: r["message"] for k, r in results.items() if r["outcome"] in ("failed", "error")}
        slowest = sorted(results, key=lambda name: -results[name]["seconds"])[:10]
        return {
            "status": 0 if outcomes and not bad and not unfinished else 1,
            "seconds": self.seconds,
            "processes": self.workers,
            "passed": outcomes.count("passed"),
            "failed": outcomes.count("failed"),
            "errors": outcomes.count("error"),
            "skipped": outcomes.count("skipped"),
            "files": len(self.files),
            "files not finished": unfinished,
            "slowest": {name: round(results[name]["seconds"], 2) for name in slowest},
            "failing": bad,
        }

    def _feed(self) -> None:
        """Gives files to a process, and to others when it ends."""
        worker: Worker | None = None
        try:
            while time.monotonic() < self._end:
                with self._lock:
                    if not self._left:
                        return
                    name = self._left.popleft()
                done: set[str] = set()
                for _ in range(3):  # a process that crashes or hangs loses one test
                    worker = worker or Worker()
                    whole = worker.run(name, self.marks, done, self._note, self._deadline)
                    if not whole:
                        worker = worker.end()
                    if whole or time.monotonic() >= self._end:
                        break
                if whole:
                    with self._lock:
                        self.unfinished.discard(name)
                if worker is not None and worker.tainted:
                    worker = worker.end()
        finally:
            if worker is not None:
                worker.end()

    def _deadline(self, more: float) -> float:
        return min(self._end, time.monotonic() + self.one_test + more)

    def _note(self, name: str, result: dict[str, Any]) -> None:
        with self._lock:
            self.results[name] = result


class Worker:
    """A process that runs test files."""

    def __init__(self) -> None:
        self.tainted = False  # after a failure, which may have been one of the device
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, marks: str, done: set[str], note: Any, deadline: Any) -> bool:
        """Runs a file but for the tests that are done; False if the process ended before."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        running, late = "", threading.Event()
        watch = _Watch(deadline(START), self.process, late)
        try:
            self.process.stdin.write(
                json.dumps({"file": name, "marks": marks, "done": [*done]}) + "\n"
            )
            self.process.stdin.flush()
            for line in self.process.stdout:
                told = json.loads(line)
                watch.deadline = deadline(START if "outcome" in told else 0.0)
                if "file" in told:
                    self.tainted = self.tainted or told["tainted"]
                    return True
                running = told["test"]
                if "outcome" in told:
                    done.add(running)
                    note(running, {k: told[k] for k in ("outcome", "seconds", "message")})
                    running = ""
        except (BrokenPipeError, json.JSONDecodeError):
            pass
        finally:
            watch.stop()
        if running:
            done.add(running)
            message = "ended by the limit of time" if late.is_set() else "the process crashed"
            note(running, {"outcome": "error", "seconds": 0.0, "message": message})
        return False

    def end(self) -> None:
        """Ends the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        self.process.wait()


class _Watch:
    """Ends a process at a deadline that moves."""

    def __init__(
        self, deadline: float, process: subprocess.Popen[str], late: threading.Event
    ) -> None:
        self.deadline, self._over = deadline, threading.Event()
        threading.Thread(target=self._wait, args=(process, late), daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _wait(self, process: subprocess.Popen[str], late: threading.Event) -> None:
        while not self._over.wait(0.2):
            if time.monotonic() > self.deadline:
                late.set()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                return


class _Reporter:
    """A plugin of pytest that tells of each test, and leaves out those that are done."""

    def __init__(self, tell: Any, done: set[str]) -> None:
        self.tell, self.done, self.failed = tell, done, False
        self._seconds, self._outcome, self._message = 0.0, "passed", ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._end(report.nodeid, "error", 0.0, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._seconds, self._outcome, self._message = 0.0, "passed", ""
        self.tell({"test": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seconds += report.duration
        if report.failed:
            self._outcome = "failed" if report.when == "call" else "error"
            self._message = str(report.longrepr)
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._end(nodeid, self._outcome, self._seconds, self._message)

    def _end(self, name: str, outcome: str, seconds: float, message: str) -> None:
        self.failed = self.failed or outcome in ("failed", "error")
        self.tell(
            {"test": name, "outcome": outcome, "seconds": seconds, "message": message[-MESSAGE:]}
        )


def work() -> None:
    """Runs the files that are named on standard input."""
    told = os.fdopen(os.dup(1), "w")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # what tests print is no answer
    import pytest

    def tell(fact: dict[str, Any]) -> None:
        told.write(json.dumps(fact) + "\n")
        told.flush()

    for line in sys.stdin:
        order = json.loads(line)
        reporter = _Reporter(tell, set(order["done"]))
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
        arguments += ["-m", order["marks"], order["file"]]
        status = pytest.main(arguments, plugins=[reporter])
        # 5: none of its tests is for this device.
        tainted = reporter.failed or int(status) not in (0, 5)
        tell({"file": order["file"], "tainted": tainted})


if __name__ == "__main__":
    work()
