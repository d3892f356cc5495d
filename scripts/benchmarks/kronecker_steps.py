"""Time of a step, averaged over one period of refreshed bases or inverse roots."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch

from .harness import Timing, alternate, say
from .kronecker_contenders import (
    BASE,
    PEER,
    PERIOD,
    Make,
    Problem,
    contenders,
    problems,
    take_steps,
)
from .registry import Options
from .report import Report, Table, seconds

RATE = 1e-3  # networks learn, so that bases turn as they do in training
OURS = "SOAP (ours)"


def period_of(problem: Problem, make: Make) -> Callable[[], None]:
    """One period of steps with the standard closure, on a copy of the network."""
    model = copy.deepcopy(problem.model)
    optimizer = make(model.parameters(), lr=RATE)

    return partial(take_steps, problem, model, optimizer)


def overhead(timings: dict[str, Timing], name: str) -> float:
    """Median over the rounds of the additional time per step, in steps of AdamW."""
    pairs = zip(timings[name].samples, timings[BASE].samples, strict=True)
    return statistics.median(own - base for own, base in pairs) / timings[BASE].median


def run(options: Options, report: Report) -> None:
    """Measures each network."""
    makers = contenders(options)
    summary = Table(
        f"Overhead of SOAP over a step of {BASE}, in steps of {BASE}",
        ["network", "ours", "pytorch_optimizer", "ours / theirs"],
    )
    for problem in problems(options):
        say(f"measuring {problem.name} with {len(makers)} optimizers in turns")
        calls = {name: period_of(problem, make) for name, make in makers.items()}
        # Its warm-up takes two periods: first steps differ, by exact eigenbases for instance.
        least = 1e-3 if options.quick else 0.3
        timings = alternate(calls, options.repeat, options.device, least)
        base = timings[BASE].median
        table = Table(
            f"{problem.name}, {torch.get_num_threads()} threads: mean time of {PERIOD} steps",
            ["optimizer", "step", f"over {BASE}", "overhead", "of pytorch_optimizer's SOAP"],
        )
        for name, timing in timings.items():
            extra = overhead(timings, name)
            relative = "-"
            if PEER in timings and name != BASE:
                relative = f"{extra / overhead(timings, PEER):.2f}"
            table.add(
                name,
                seconds(timing.median / PERIOD),
                f"{timing.median / base:.2f}",
                "-" if name == BASE else f"{1e3 * extra * base / PERIOD:.2f} ms",
                relative,
            )
        report.show(table)
        results = {
            name: timing.as_dict()
            | {"overhead": overhead(timings, name), f"over {BASE}": timing.median / base}
            for name, timing in timings.items()
        }
        report.record(f"kronecker.steps.{problem.name}", results)
        if OURS in timings and PEER in timings:
            own, peer = overhead(timings, OURS), overhead(timings, PEER)
            summary.add(problem.name, f"{own:.2f}", f"{peer:.2f}", f"{own / peer:.2f}")
    if summary.rows:
        report.show(summary)
