"""Many constraints and many parameters: where an iteration of `Constrained(LBFGS)` spends its time.

The pieces that no implementation avoids are timed beside it: the evaluation of loss and
constraints, the rows of the Jacobian, and their inner products.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_secondorder import LBFGS, Constrained

from .diagonal_memory import resident
from .harness import Timing, alternate, progress, say
from .registry import Options
from .report import Report, Table, number, seconds

ITERATIONS = 10
SIZES = ((100_000, 1), (100_000, 100), (100_000, 500), (1_000_000, 1), (1_000_000, 100))
QUICK = ((1_000, 10),)
SHOWN = 12


@dataclass
class Large:
    """A separable loss whose variables are in blocks, with a constraint on each block.

    Each Jacobian row is dense for the optimizer, for it cannot know better.

    Attributes:
        n: The number of variables.
        m: The number of constraints.
        device: The device.
    """

    n: int
    m: int
    device: torch.device

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.logspace(0, 2, self.n, device=self.device)
        self.target = torch.rand(self.n, generator=generator).to(self.device) + 0.5
        self.start = torch.full((self.n,), 0.1, device=self.device)
        self.x = self.start.clone().requires_grad_()

    def loss(self) -> Tensor:
        """A weighted distance with a fourth power, so that the curvature changes."""
        away = self.x - self.target
        return (self.scale * (away.square() + 0.1 * away.pow(4))).mean()

    def values(self) -> Tensor:
        """The mean square of each block, less what it may be."""
        per = self.n // self.m
        return self.x[: per * self.m].reshape(self.m, per).square().mean(1) - 0.8

    def evaluate(self) -> None:
        """Loss and gradient, without constraints."""
        self.x.grad = None
        self.loss().backward()

    def jacobian(self) -> Tensor:
        """The rows of the Jacobian, one backward pass each."""
        values = self.values()
        rows = [torch.autograd.grad(v, self.x, retain_graph=True)[0] for v in values.unbind()]
        return torch.stack(rows)

    def restart(self, method: str | None = None, iterations: int = ITERATIONS) -> Any:
        """An optimizer at the start; without a method, one without constraints."""
        with torch.no_grad():
            self.x.copy_(self.start)
        inner = LBFGS([self.x], max_iter=iterations, tolerance_grad=0.0, tolerance_change=0.0)
        if method is None:
            return inner
        return Constrained(inner, inequalities=self.values, method=method)  # type: ignore[arg-type]

    def run(self, method: str | None, iterations: int = ITERATIONS) -> Any:
        """A step of so many iterations from the start; returns the report of L-BFGS."""
        optimizer = self.restart(method, iterations)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        optimizer.step(closure)
        return optimizer.info if method is None else optimizer.info.inner


def _peak(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory beyond what is there, in bytes; None if the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # resets the peak
    except OSError:
        return None
    before = resident()
    call()
    lines = status.read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return float(int(peak.split()[1]) * 1024 - before)


def _profile(call: Callable[[], object]) -> list[tuple[str, float, int]]:
    """The functions with the most time of their own: name, seconds, calls."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(call)
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    entries = [
        (f"{Path(file).name}:{line} {name}" if line else name, own, calls)
        for (file, line, name), (_, calls, own, _, _) in stats.items()
    ]
    return sorted(entries, key=lambda entry: -entry[1])[:SHOWN]


def run(options: Options, report: Report) -> None:
    """Times an iteration, its pieces and its memory, and profiles it."""
    title = f"{ITERATIONS} iterations of LBFGS on separate blocks, float32; times of one iteration"
    table = Table(
        title,
        [
            *("n", "m", "evaluation", "Jacobian", "J J'", "LBFGS", "sqp"),
            *("evaluations", "of the Jacobian", "peak", "peak / J"),
        ],
    )
    profiles = []
    for n, m in progress(QUICK if options.quick else SIZES, "large problems"):
        large = Large(n, m, options.device)
        jacobian = large.jacobian()
        plain, sqp = large.run(None), large.run("sqp")
        calls: dict[str, Callable[[], object]] = {
            "evaluation": large.evaluate,
            "Jacobian": large.jacobian,
            "J J'": lambda jacobian=jacobian: jacobian @ jacobian.T,  # type: ignore[misc]
            "LBFGS": partial(large.run, None),
            "sqp": partial(large.run, "sqp"),
        }
        timings = alternate(calls, min(options.repeat, 3), options.device, min_seconds=0.0)
        per = {name: _per_iteration(name, t, plain, sqp) for name, t in timings.items()}
        del jacobian, calls
        peak = _peak(partial(large.run, "sqp"), options.device)
        rows = 4.0 * n * m
        evaluations = sqp.evaluations / max(sqp.iterations, 1)
        table.add(
            f"{n:,}",
            m,
            *(seconds(per[name]) for name in ("evaluation", "Jacobian", "J J'", "LBFGS", "sqp")),
            number(evaluations),
            number(per["sqp"] / (evaluations * per["Jacobian"])),
            "-" if peak is None else f"{peak / 2**20:.0f} MiB",
            "-" if peak is None else number(peak / rows),
        )
        start = time.process_time()
        entries = _profile(partial(large.run, "sqp"))
        profiles.append((n, m, entries, time.process_time() - start))
        report.record(
            f"constraints.large.{n}.{m}",
            {
                "per iteration": per,
                "iterations": sqp.iterations,
                "evaluations": sqp.evaluations,
                "peak": peak,
                "profile": entries,
            },
        )
    report.show(table)
    say("evaluations: in an iteration; of the Jacobian: the time of sqp over that of its Jacobians")
    for n, m, entries, whole in profiles:
        shown = Table(
            f"n = {n:,}, m = {m}: functions by their own time", ["function", "share", "calls"]
        )
        for name, own, calls_made in entries:
            shown.add(name[:70], f"{own / whole:.0%}", calls_made)
        report.show(shown)


def _per_iteration(name: str, timing: Timing, plain: Any, sqp: Any) -> float:
    done = {"LBFGS": plain, "sqp": sqp}.get(name)
    return timing.median / (max(done.iterations, 1) if done is not None else 1)
