"""Measures what a release publishes, part by part: `scripts/bench.py release`.

Each part is a process of its own with a limit of time, and leaves one file. A second run goes on
where the first one ended, and measures again what was measured beside other work.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..report import environment as describe
from .figures import COUNTS, Record, flatten

ROOT = Path(__file__).resolve().parents[3]
BENCH = "scripts/bench.py"
#: Seconds that a process is given to end, and below which no part is begun.
GRACE, LEAST = 5.0, 10.0


@dataclass(frozen=True)
class Part:
    """A part of a benchmark as a release measures it.

    Attributes:
        name: The sub-command.
        part: Its part, if it has parts.
        seconds: The most that it may take.
        options: Further options.
        counts: Whether it counts evaluations or bytes, which do not depend on the machine's load.
        script: The script; that of an example has `--json` and `--out`, and its name is `name`.
    """

    name: str
    part: str | None
    seconds: float
    options: tuple[str, ...] = ()
    counts: bool = False
    script: str = BENCH

    @property
    def title(self) -> str:
        """The sub-command and the part."""
        return f"{self.name} {self.part}" if self.part else self.name

    @property
    def arguments(self) -> list[str]:
        """The arguments of the script."""
        part = ["--part", self.part] if self.part else []
        name = [self.name] if self.script == BENCH else []
        return [*name, *part, *self.options]

    @property
    def command(self) -> str:
        """The command that a reader would enter."""
        return " ".join(["python", self.script, *self.arguments])

    def file(self, folder: Path) -> Path:
        """The file of its figures."""
        return folder / f"{self.title.replace(' ', '.')}.json"


def example(name: str, seconds: float, *options: str) -> Part:
    """One of the examples as a part of a release."""
    return Part(name, None, seconds, options, script=f"examples/{name}.py")


ONE = ("--threads", "1")
#: What is measured, the most telling first.
PLAN: tuple[Part, ...] = (
    Part("lbfgs", "problems", 300, ("--repeat", "3"), counts=True),
    Part("lbfgs", "direction", 60),
    Part("residuals", "poisson", 240, ("--seconds", "200", *ONE)),
    Part("minimize", "exact", 300, ("--repeat", "3"), counts=True),
    Part("products", None, 60),
    Part("diagonal", "steps", 75),
    Part("residuals", "problems", 150, counts=True),
    Part("residuals", "nist", 240, ("--repeat", "3"), counts=True),
    Part("constraints", "problems", 240, counts=True),
    Part("quasi_newton", "bounds", 120, counts=True),
    Part("newton", "exact", 200, ("--repeat", "3"), counts=True),
    Part("jacobian", None, 45),
    Part("penalties", None, 45),
    Part("newton", "cg", 300),
    Part("lbfgs", "softmax", 120, ("--seconds", "100")),
    Part("iteration_costs", None, 120, ("--repeat", "3")),
    Part("minimize", "call", 45),
    Part("lbfgs", "overhead", 60),
    Part("capture", None, 40),
    Part("compile", None, 90, ONE),
    Part("quasi_newton", "iteration", 40),
    Part("residuals", "jacobian", 90, ONE),
    Part("residuals", "kernel", 90, ONE),
    Part("constraints", "overhead", 150),
    Part("lightning", None, 150),
    Part("quasi_newton", "problems", 60, counts=True),
    Part("quasi_newton", "nonlinear_cg", 60, counts=True),
    Part("newton", "problems", 60, counts=True),
    Part("constraints", "pca", 120, counts=True),
    Part("diagnostics", None, 60, counts=True),
    Part("distributed", "communication", 60, counts=True),
    Part("distributed", "memory", 60, counts=True),
    Part("kronecker", "memory", 180, counts=True),
    Part("linear", None, 60, counts=True),
    Part("kronecker", "steps", 400, ("--repeat", "2")),
    Part("newton", "softmax", 120, ("--seconds", "100")),
    Part("newton", "pinn", 240, ("--seconds", "200")),
    Part("quasi_newton", "seconds", 240, ("--seconds", "200")),
    Part("newton", "autoencoder", 240, ("--seconds", "200")),
    Part("quasi_newton", "poisson", 280, ("--threads", "1"), counts=True),
    Part("quasi_newton", "limited", 600, ("--threads", "1"), counts=True),
    Part("minimize", "2-point", 240, ("--repeat", "1"), counts=True),
    Part("diagonal", "estimates", 60, counts=True),
    Part("diagonal", "memory", 120),
    Part("diagonal", "scaling", 200),
    Part("residuals", "iteration", 60),
    Part("residuals", "pinn", 120, ("--seconds", "100", *ONE)),
    Part("residuals", "burgers", 240, ("--seconds", "200", *ONE)),
    Part("constraints", "minibatch", 200),
    Part("constraints", "large", 240),
    Part("quasi_newton", "convection", 600, ONE, counts=True),
    Part("kronecker", "quality", 600),
    example("train_classifier", 600),
    example("train_char_lm", 400, "--seconds", "20", "--seeds", "1"),
    example("deep_autoencoder", 400),
    example("poisson_100d", 450),
    Part("residuals", "convection", 1600, ONE),
)
# The names of times, and of ratios of times.
_TIMES = re.compile(r"time|seconds")


def is_done(file: Path, counts: bool) -> bool:
    """True if all of a part was measured; without `counts` also its times, on a quiet machine."""
    if not file.exists():
        return False
    record = Record.read(file)
    if counts:
        return not record.note or record.note == COUNTS
    return not record.note and not record.was_busy


def run_command(command: Sequence[str], limit: float) -> int | str:
    """Runs a command and all processes that it starts, no longer than a limit."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGINT)
        _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
        process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def to_record(document: Path, part: Part, note: str, counts: bool) -> Record:
    """The results of a run in the form in which they are kept."""
    found = json.loads(document.read_text(encoding="utf-8"))
    described = found.get("environment") or describe(torch.device("cpu"))
    environment = {key: value for key, value in described.items() if value is not None}
    peers = environment.get("peers", {})
    environment["peers"] = {name: version for name, version in peers.items() if version}
    figures = flatten(found["results"])
    if counts:
        figures = {
            name: figure
            for name, figure in figures.items()
            if figure.unit not in ("s", "B/s") and not _TIMES.search(name)
        }
        note = f"{note} {COUNTS}".strip()
    return Record(part.title, part.command, environment, figures, note)


def measure(part: Part, folder: Path, limit: float, counts: bool = False) -> int | str:
    """Runs a part and keeps what it has measured, be it all or not.

    Returns:
        The exit status, or the reason for which there is none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "results.json"
        command = [sys.executable, str(ROOT / part.script), *part.arguments, "--json", str(output)]
        if part.script.startswith("examples/"):
            command += ["--out", str(Path(scratch) / "plot.png")]
        if counts:
            command += ["--repeat", "1"]
        status = run_command(command, min(part.seconds, limit))
        if output.exists():
            note = "" if status == 0 else f"Incomplete: {status}."
            record = to_record(output, part, note, counts)
            file = part.file(folder)
            before = Record.read(file) if file.exists() else None
            # What was complete is not replaced by less.
            if not note or before is None or before.note:
                record.write(file)
    return status


def release(
    folder: Path,
    minutes: float,
    again: bool = False,
    counts: bool = False,
    only: str = "",
    plan: Sequence[Part] = PLAN,
) -> dict[str, int | str]:
    """Measures the parts that are not in the folder, in the order of the plan.

    Args:
        folder: The folder of the release, such as `scripts/benchmarks/figures/0.2.0`.
        minutes: No part begins that would take longer than this in all.
        again: Measure the parts that are there as well.
        counts: Only the parts that count, and without times, for a machine that is not quiet.
        only: A text that the title of a part must contain.
        plan: The parts.

    Returns:
        The status of each part: 0, another exit status, or the reason why it was not measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60.0 * minutes
    statuses: dict[str, int | str] = {}
    for part in plan:
        if only not in part.title or (counts and not part.counts):
            continue
        if not again and is_done(part.file(folder), counts):
            statuses[part.title] = "there"
            continue
        left = end - time.monotonic() - GRACE
        if left < LEAST:
            statuses[part.title] = "no time left"
            continue
        print(f"==> {part.title}: at most {min(part.seconds, left):.0f} s", flush=True)
        begin = time.monotonic()
        statuses[part.title] = measure(part, folder, left, counts)
        print(f"==> {part.title}: {time.monotonic() - begin:.0f} s", flush=True)
    return statuses
